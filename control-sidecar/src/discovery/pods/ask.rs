//! Ask: one engine's answers, over HTTP.

use std::net::{IpAddr, SocketAddr};

use reqwest::redirect::Policy;
use reqwest::{Client, StatusCode};

use super::super::probe::{ProbeError, Sockets, served, sglang_sockets, vllm_sockets};
use super::Answers;
use crate::adapter::Engine;
use crate::limits::{PROBE_BYTES_MAX, PROBE_TIMEOUT};

/// Reads the page that tells of an engine's sockets.
type ReadSockets = fn(&[u8], IpAddr) -> Result<Sockets, ProbeError>;

/// Asks engines of one kind.
#[derive(Clone, Debug)]
pub(super) struct Asker {
    client: Client,
    engine: Engine,
}

impl Asker {
    /// # Errors
    ///
    /// If there can be no client.
    pub(super) fn new(engine: Engine) -> Result<Self, String> {
        // Engines are asked at the address that their pod has, and nowhere else.
        let client = Client::builder()
            .no_proxy()
            .redirect(Policy::none())
            .timeout(PROBE_TIMEOUT)
            .build()
            .map_err(|error| error.to_string())?;
        Ok(Self { client, engine })
    }

    /// What the engine at an address serves, and where it publishes.
    pub(super) async fn ask(&self, address: SocketAddr) -> Result<Answers, ProbeError> {
        let served = match self.get(address, "/v1/models").await? {
            Some(body) => served(&body)?,
            None => return Err(ProbeError::Status),
        };
        let (path, read): (_, ReadSockets) = match self.engine {
            Engine::Vllm => ("/kv_event_sources", vllm_sockets),
            Engine::Sglang => ("/server_info", sglang_sockets),
        };
        let sockets = match self.get(address, path).await? {
            Some(body) => read(&body, address.ip())?,
            None => Sockets::new(),
        };
        Ok(Answers { sockets, served })
    }

    /// A body; `None` if the engine has no such page, as older ones do not.
    async fn get(&self, address: SocketAddr, path: &str) -> Result<Option<Vec<u8>>, ProbeError> {
        let asked = self.client.get(format!("http://{address}{path}")).send().await;
        let mut response = asked.map_err(|_| ProbeError::Unreachable)?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND
            | StatusCode::METHOD_NOT_ALLOWED
            | StatusCode::NOT_IMPLEMENTED => {
                return Ok(None);
            }
            _ => return Err(ProbeError::Status),
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|_| ProbeError::Unreachable)? {
            if body.len() + chunk.len() > PROBE_BYTES_MAX {
                return Err(ProbeError::TooLong);
            }
            body.extend_from_slice(&chunk);
        }
        Ok(Some(body))
    }
}
