//! The picker as one router among others.

use warmpath_core::entry::Entry;
use warmpath_core::ids::WorkerSlot;
use warmpath_core::load::{Booking, BookingId};
use warmpath_sidecar::run::Sidecar;

use super::gateway::{DUPLEX, Exchange, mutated};
use super::{COMPLETIONS, DESTINATION, PICKER, completion};
use crate::ports::free_port;
use crate::replicas::{Gateway, LIST, slot_of};
use crate::support::*;

async fn start(own: u16, peer: u16, picker: &str) -> Sidecar {
    let rest = format!(
        "workers: [{{id: 1, model: tiny, endpoint: \"127.0.0.1:9\"}}, \
         {{id: 2, model: tiny, endpoint: \"127.0.0.1:10\"}}]\n\
         router: {{router_replica_sync: true}}\n\
         replicas: {{listen: \"127.0.0.1:{own}\", peers: [\"127.0.0.1:{peer}\"]}}\n{picker}"
    );
    let sidecar = Sidecar::start(config(0, &rest)).await.unwrap();
    eventually("the workers are known", || async {
        state(&sidecar).await["workers"].as_array().is_some_and(|workers| workers.len() == 2)
    })
    .await;
    sidecar
}

/// Goal: with replica sync, what the picker books counts for other gateways until
/// it ends, and what they book counts for the picker.
#[tokio::test]
async fn bookings_are_exchanged_with_other_routers() {
    let [here, there] = [0; 2].map(|_| free_port().unwrap());
    let ours = start(here, there, &format!("{PICKER}}}")).await;
    let theirs = start(there, here, "").await;
    let mut gateway = Gateway::attach(&theirs, 77).await;
    let picker = ours.picker.as_ref().unwrap().address;
    let mut exchange = Exchange::open(picker, DUPLEX).await;
    exchange.post(COMPLETIONS).await;
    let streamed = String::from_utf8(completion(4)).unwrap().replacen('{', "{\"stream\":true,", 1);
    exchange.body(streamed, true).await;
    let chosen = mutated(exchange.reply().await).set["x-dynamo-worker-instance-id"].clone();
    exchange.whole_body(false).await;
    let slot = slot_of(&theirs, chosen.parse().unwrap()).await;
    gateway.sees(slot, (1, 16, 4)).await;
    exchange.respond("200", false).await;
    exchange.reply().await;
    exchange.response_body("{", false).await;
    exchange.reply().await;
    gateway.sees(slot, (1, 0, 4)).await;
    drop(exchange);
    gateway.sees(slot, (0, 0, 0)).await;
    // The other way: a worker that another gateway keeps busy is not chosen.
    let busy = Entry::Booked(Booking {
        prefill_tokens: 100_000,
        ..Booking::new(BookingId(9), WorkerSlot(slot), 0)
    });
    gateway.say(LIST, &[busy]).await;
    let other = if chosen == "1" { "127.0.0.1:10" } else { "127.0.0.1:9" };
    eventually("the picker knows", || async {
        let mut choices = Vec::new();
        for _ in 0..8 {
            let mut exchange = Exchange::open(picker, DUPLEX).await;
            exchange.post(COMPLETIONS).await;
            exchange.body(completion(2), true).await;
            choices.push(mutated(exchange.reply().await).set[DESTINATION].clone());
        }
        choices.iter().all(|choice| choice == other)
    })
    .await;
    ours.stop().await;
    theirs.stop().await;
}
