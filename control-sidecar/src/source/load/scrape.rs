//! Scrape: looks at a page for Prometheus once a second.

use std::time::Duration;

use reqwest::redirect::Policy;
use reqwest::{Client, Response};
use tokio::time::{MissedTickBehavior, interval};
use warmpath_core::ids::Worker;

use super::{Accounts, labelled};
use crate::adapter::gauges::scan;
use crate::limits::{SCRAPE_BYTES_MAX, SCRAPE_EVERY};

/// Looks at a page until nobody takes updates.
pub(super) async fn follow(url: &str, mut accounts: Accounts) {
    let Some(id) = accounts.worker else {
        // A page does not say whose it is.
        return accounts.metrics.load_dropped("no_worker");
    };
    let Ok(client) = client(SCRAPE_EVERY) else {
        return accounts.metrics.scrape_failed("client");
    };
    let mut ticks = interval(SCRAPE_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match page(&client, url).await {
            Ok(page) => {
                for (label, load) in scan(&page) {
                    match labelled(label, &accounts.ranks) {
                        Some(rank) => accounts.take(Worker { id, rank }, &load),
                        None => accounts.metrics.load_dropped("other_rank"),
                    }
                }
            }
            Err(reason) => accounts.metrics.scrape_failed(reason),
        }
        if accounts.tell().await.is_err() {
            return;
        }
    }
}

/// A client that goes nowhere but where it is sent.
fn client(patience: Duration) -> reqwest::Result<Client> {
    Client::builder().timeout(patience).no_proxy().redirect(Policy::none()).build()
}

/// Gets a page, or a fixed word for why not.
async fn page(client: &Client, url: &str) -> Result<String, &'static str> {
    let response = client.get(url).send().await.map_err(|error| why(&error))?;
    if !response.status().is_success() {
        return Err("status");
    }
    let bytes = body(response).await?;
    String::from_utf8(bytes).map_err(|_| "not_text")
}

async fn body(mut response: Response) -> Result<Vec<u8>, &'static str> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| why(&error))? {
        if bytes.len() + chunk.len() > SCRAPE_BYTES_MAX {
            return Err("over_limit");
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

fn why(error: &reqwest::Error) -> &'static str {
    if error.is_timeout() {
        "timeout"
    } else if error.is_connect() {
        "connect"
    } else {
        "network"
    }
}
