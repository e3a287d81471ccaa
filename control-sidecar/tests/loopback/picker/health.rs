//! The health service, as a probe asks it.

use std::net::SocketAddr;

use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use warmpath_sidecar::run::Sidecar;

use super::PICKER;
use super::gateway::connect;
use crate::support::*;

async fn health(at: SocketAddr, service: &str) -> Result<ServingStatus, Code> {
    let mut client = HealthClient::new(connect(at).await);
    let request = HealthCheckRequest { service: service.to_owned() };
    client.check(request).await.map(|it| it.into_inner().status()).map_err(|status| status.code())
}

/// Goal: a probe lets no request in before there is a roster, and sees that the
/// process lives all the while.
#[tokio::test]
async fn it_serves_once_there_is_a_roster() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("workers.yaml");
    std::fs::write(&file, "workers: []").unwrap();
    // The roster waits for the model, which waits for the deadline: this one is
    // not there.
    let rest = format!("workers_file: {:?}\n{PICKER}}}", folder.path().join("missing.yaml"));
    let sidecar = Sidecar::start(config(600_000, &rest)).await.unwrap();
    let picker = sidecar.picker.as_ref().unwrap();
    let names =
        ["", "readiness", "inference-extension", "envoy.service.ext_proc.v3.ExternalProcessor"];
    for at in [picker.address, picker.health] {
        eventually("it answers", || async {
            health(at, "").await == Ok(ServingStatus::NotServing)
        })
        .await;
        for name in names {
            assert_eq!(health(at, name).await, Ok(ServingStatus::NotServing), "{name}");
        }
        assert_eq!(health(at, "liveness").await, Ok(ServingStatus::Serving));
        assert_eq!(health(at, "unknown").await, Err(Code::NotFound));
    }
    std::fs::rename(&file, folder.path().join("missing.yaml")).unwrap();
    for at in [picker.address, picker.health] {
        for name in names {
            eventually("it serves", || async {
                health(at, name).await == Ok(ServingStatus::Serving)
            })
            .await;
        }
    }
    let mut client = HealthClient::new(connect(picker.health).await);
    let request = HealthCheckRequest { service: String::new() };
    let mut watched = client.watch(request).await.unwrap().into_inner();
    assert_eq!(watched.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    let stopping = tokio::spawn(sidecar.stop());
    let next = tokio::time::timeout(PATIENCE, watched.message()).await.unwrap();
    assert_eq!(next.unwrap().unwrap().status(), ServingStatus::NotServing, "before it goes");
    drop(watched);
    stopping.await.unwrap();
}
