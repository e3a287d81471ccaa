//! Against the real etcd, which comes with Debian's `etcd-server`.

use std::path::Path;
use std::process::Stdio;

use etcd_client::{LeaseGrantOptions, PutOptions};
use tokio::process::{Child, Command};

use std::time::Duration;

use self::ports::free_port;
use super::*;
use crate::config::discovery::{Backend, DiscoveryConfig, FrontendRule, NamespaceRule};
use crate::discovery::{ListEvent, captures, drive};
use crate::fleet::Fleet;
use crate::limits::ETCD_PAGE_KEYS;

#[path = "../../../../tests/src/stack/ports.rs"]
#[expect(unreachable_pub, reason = "it is a module of a library, too")]
mod ports;

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(30);

/// The leases of the capture: decode and prefill.
const LEASES: [i64; 2] = [0x7d7b_a201_f909_9a17, 0x7d7b_a201_f909_9a05];

/// Starts etcd, which ends with its handle.
fn start(data: &Path, client: u16, peer: u16) -> Child {
    let (client, peer) = (format!("http://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
    let started = Command::new("etcd")
        .arg("--data-dir")
        .arg(data)
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}"), "--log-level", "error"])
        .env("ETCD_UNSUPPORTED_ARCH", std::env::consts::ARCH)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    started.expect("etcd is installed; see: make doctor")
}

/// A client, once etcd answers.
async fn connect(url: &str) -> Client {
    let attempt = async {
        loop {
            let options = ConnectOptions::new().with_connect_timeout(CONNECT_TIMEOUT);
            if let Ok(mut client) = Client::connect([url], Some(options)).await
                && client.get("any", None).await.is_ok()
            {
                return client;
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, attempt).await.expect("etcd answers")
}

async fn fill(client: &mut Client) {
    for id in LEASES {
        client.lease_grant(600, Some(LeaseGrantOptions::new().with_id(id))).await.unwrap();
    }
    for (key, value) in captures::etcd() {
        let lease = LEASES[usize::from(key.to_string().contains("/prefill"))];
        let options = PutOptions::new().with_lease(lease);
        client.put(key.to_string(), value.to_string(), Some(options)).await.unwrap();
    }
}

async fn next(lists: &mut mpsc::Receiver<ListEvent>) -> ListEvent {
    timeout(PATIENCE, lists.recv()).await.expect("in time").expect("it goes on")
}

/// The next fleet that holds as many ranks; failures before it are passed over,
/// other fleets are not.
async fn taken(lists: &mut mpsc::Receiver<ListEvent>, ranks: &[usize]) -> Fleet {
    loop {
        if let ListEvent::Taken(fleet) = next(lists).await {
            assert!(ranks.contains(&fleet.ranks.len()), "{fleet:?}");
            if ranks.last() == Some(&fleet.ranks.len()) {
                return fleet;
            }
        }
    }
}

#[tokio::test]
async fn records_are_listed_watched_and_kept_over_a_restart() {
    let data = tempfile::tempdir().unwrap();
    let (port, peer) = (free_port().unwrap(), free_port().unwrap());
    let url = format!("http://127.0.0.1:{port}");
    let config = DiscoveryConfig {
        backend: Backend::Etcd { endpoints: vec![url.clone()], user: None },
        namespaces: NamespaceRule::Exact("dynamo".into()),
        frontend: FrontendRule::PodPort(8000),
    };
    let (events, mut lists) = mpsc::channel(1);
    let task = tokio::spawn(drive::run(config, Vec::new(), false, events));
    assert!(matches!(next(&mut lists).await, ListEvent::Refused(_)), "etcd is not there yet");

    let mut etcd = start(data.path(), port, peer);
    let mut client = connect(&url).await;
    fill(&mut client).await;
    let first = taken(&mut lists, &[0, 1, 2]).await;
    assert_eq!(first.models.len(), 1);

    etcd.kill().await.unwrap();
    assert!(matches!(next(&mut lists).await, ListEvent::Refused(_)), "and nothing is emptied");
    let _etcd = start(data.path(), port, peer);
    let again = taken(&mut lists, &[2]).await;
    assert_eq!((again.ranks, again.load_streams), (first.ranks, first.load_streams));

    let mut client = connect(&url).await;
    client.lease_revoke(LEASES[1]).await.unwrap();
    let left = taken(&mut lists, &[2, 1]).await;
    assert!(left.ranks.iter().all(|rank| rank.stream.is_none()));
    drop(lists);
    task.await.unwrap();
}

#[tokio::test]
async fn more_than_a_page_is_listed_and_a_compacted_watch_ends() {
    let data = tempfile::tempdir().unwrap();
    let (port, peer) = (free_port().unwrap(), free_port().unwrap());
    let url = format!("http://127.0.0.1:{port}");
    let _etcd = start(data.path(), port, peer);
    let mut client = connect(&url).await;
    let count = usize::try_from(ETCD_PAGE_KEYS).unwrap() + 7;
    for at in 0..count {
        // Each key is the beginning of the next.
        let key = format!("v1/instances/{}", "1".repeat(at + 1));
        client.put(key, "{}", None).await.unwrap();
    }
    client.put("v1/elsewhere", "{}", None).await.unwrap();
    client.put("v2/instances/a/b/c/1", "{}", None).await.unwrap();
    let mut records = Records::new();
    let revision = list(&client, &mut records).await.unwrap();
    assert_eq!(records.len(), count);

    client.compact(revision, None).await.unwrap();
    let session = Session::follow(client, records, revision - 100).await.unwrap();
    let (sights, mut queue) = mpsc::channel(4);
    let ended = timeout(PATIENCE, session.run(&sights)).await.expect("it ends");
    assert_eq!(ended, Some(()), "to be listed again");
    assert!(matches!(queue.try_recv(), Ok(Sight::Records(_))));
    assert!(queue.try_recv().is_err(), "and nothing was told meanwhile");
}
