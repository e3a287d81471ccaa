//! Members: the engines and the worker list that names them.
//!
//! A *place* is a set of ports, as a pod's address is; a *member* is one life of
//! an engine at a place, with an id of its own. A new member at an old place is
//! what a cluster does when it gives a pod's address to the next one.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::time::sleep;

use crate::stack::child::Child;
use crate::stack::client::get;
use crate::stack::gateway::{Gateway, Mode};
use crate::stack::launch::{EnginePorts, StackError, local, wait_until_ok};
use crate::stack::limits::{POLL, READY_WITHIN};
use crate::stack::options::Options;
use crate::stack::ports::free_port;

/// The model under load.
pub const MODEL: &str = "first";

/// The model that takes a place over.
pub const OTHER_MODEL: &str = "second";

/// A LoRA adapter of the first model, held at one place only.
pub const ADAPTER: &str = "sql";

/// The place that holds it.
pub const ADAPTER_PLACE: usize = 2;

/// Places.
pub const PLACES: usize = 3;

/// Blocks of a cache: more than all requests of the run need, so that nothing
/// is evicted and every credit given can be checked.
const BLOCKS: u32 = 20_000;

/// One life of an engine.
pub struct Member {
    /// Its worker id.
    pub id: u64,
    /// Where it is.
    pub place: usize,
    /// What it serves.
    pub model: &'static str,
    /// What it does.
    pub role: &'static str,
    child: Child,
}

/// All members, and the gateway in front of them.
pub struct Members {
    options: Options,
    folder: PathBuf,
    places: Vec<EnginePorts>,
    /// Those that are alive, listed or not.
    pub members: Vec<Member>,
    last_id: u64,
    /// Sidecar and Envoy.
    pub gateway: Gateway,
}

impl Members {
    /// Starts one member a place, the sidecar and Envoy.
    ///
    /// # Errors
    ///
    /// [`StackError`].
    pub async fn start(options: Options, folder: &Path) -> Result<Self, StackError> {
        let mut places = Vec::new();
        for _ in 0..PLACES {
            places.push(EnginePorts {
                http: free_port()?,
                events: free_port()?,
                replay: free_port()?,
            });
        }
        let mut members = Vec::new();
        for (place, id) in (0..PLACES).zip(1..) {
            members.push(start_member(&options, folder, &places, id, place, MODEL).await?);
        }
        write_list(folder, &places, &members)?;
        let model = |name: &str| {
            format!("  - {{name: {name}, directory: {:?}, block_size: 16}}\n", options.model_dir)
        };
        let sources =
            format!("models:\n{}{}workers_file: workers.yaml\n", model(MODEL), model(OTHER_MODEL));
        let ports: Vec<u16> = places.iter().map(|ports| ports.http).collect();
        let gateway = Gateway::start(&options, Mode::Endpoint, &sources, &ports, folder).await?;
        let last_id = PLACES as u64;
        Ok(Self { options, folder: folder.into(), places, members, last_id, gateway })
    }

    /// The member at a place.
    #[must_use]
    pub fn at(&self, place: usize) -> Option<&Member> {
        self.members.iter().find(|member| member.place == place)
    }

    /// Takes a member off the list, waits until the gateway knows and the engine
    /// is idle, and stops it: a pod that is drained.
    ///
    /// # Errors
    ///
    /// What did not come in time.
    pub async fn drain(&mut self, place: usize) -> Result<(), StackError> {
        let Some(at) = self.members.iter().position(|member| member.place == place) else {
            return Ok(());
        };
        let member = self.members.remove(at);
        self.publish_list().await?;
        let http = self.port(place);
        until("a drained engine is idle", || async { is_idle(http).await }).await?;
        member.child.stop().await;
        Ok(())
    }

    /// Starts a member at a place and lists it, and waits until the gateway
    /// knows.
    ///
    /// # Errors
    ///
    /// [`StackError`].
    pub async fn join(&mut self, place: usize, model: &'static str) -> Result<(), StackError> {
        self.last_id += 1;
        let member =
            start_member(&self.options, &self.folder, &self.places, self.last_id, place, model);
        self.members.push(member.await?);
        self.publish_list().await
    }

    /// Kills the member at a place without warning. It stays listed.
    pub async fn kill(&mut self, place: usize) {
        if let Some(member) = self.members.iter_mut().find(|member| member.place == place) {
            member.child.kill_now().await;
        }
    }

    /// Starts the engine of the member at a place again, under its old id.
    ///
    /// # Errors
    ///
    /// [`StackError`].
    pub async fn revive(&mut self, place: usize) -> Result<(), StackError> {
        let Some(at) = self.members.iter().position(|member| member.place == place) else {
            return Ok(());
        };
        let dead = self.members.remove(at);
        let member =
            start_member(&self.options, &self.folder, &self.places, dead.id, place, dead.model);
        self.members.push(member.await?);
        Ok(())
    }

    /// Gives members roles, by place, without waiting.
    ///
    /// # Errors
    ///
    /// If the list cannot be written.
    pub fn set_roles(&mut self, roles: [&'static str; PLACES]) -> std::io::Result<()> {
        for member in &mut self.members {
            member.role = roles.get(member.place).copied().unwrap_or("aggregated");
        }
        write_list(&self.folder, &self.places, &self.members)
    }

    /// Writes the list and waits until the gateway knows it.
    async fn publish_list(&self) -> Result<(), StackError> {
        write_list(&self.folder, &self.places, &self.members)?;
        let mut wanted: Vec<u64> = self.members.iter().map(|member| member.id).collect();
        wanted.sort_unstable();
        until("the gateway knows the worker list", || async {
            let listed = self.listed().await;
            listed.as_deref() == Some(&wanted) && self.is_level().await
        })
        .await
    }

    /// Ids of the workers that the sidecar knows, ascending.
    async fn listed(&self) -> Option<Vec<u64>> {
        let state = self.gateway.state().await?;
        let workers = state.get("workers")?.as_array()?;
        let mut ids: Vec<u64> =
            workers.iter().filter_map(|worker| worker.get("id")?.as_u64()).collect();
        ids.sort_unstable();
        Some(ids)
    }

    /// Whether the module has applied all that the sidecar has sent.
    pub async fn is_level(&self) -> bool {
        let state = self.gateway.state().await;
        let logged = state.and_then(|state| state.get("sequence")?.as_u64());
        let applied = self.gateway.stat("warmpath_feed_sequence").await;
        logged.is_some() && logged == applied
    }

    /// What the state page says of the member at a place.
    pub async fn state_of(&self, place: usize) -> Option<Value> {
        let id = self.at(place)?.id;
        let state = self.gateway.state().await?;
        let workers = state.get("workers")?.as_array()?;
        workers.iter().find(|worker| worker.get("id").and_then(Value::as_u64) == Some(id)).cloned()
    }

    /// Name and end of the log of a process that ended by itself.
    pub fn ended(&mut self) -> Option<(String, String)> {
        let members = self.members.iter_mut();
        let of_member = members
            .filter_map(|it| {
                it.child.ended().map(|_| (it.child.name().into(), it.child.log_tail()))
            })
            .next();
        of_member.or_else(|| self.gateway.ended())
    }

    /// Stops everything, the gateway first.
    pub async fn stop(self) {
        self.gateway.stop().await;
        for member in self.members {
            member.child.stop().await;
        }
    }

    fn port(&self, place: usize) -> u16 {
        self.places.get(place).map_or(0, |ports| ports.http)
    }
}

/// Name of a member, as in `x-engine-id`.
#[must_use]
pub fn name_of(id: u64) -> String {
    format!("engine-{id}")
}

async fn start_member(
    options: &Options,
    folder: &Path,
    places: &[EnginePorts],
    id: u64,
    place: usize,
    model: &'static str,
) -> Result<Member, StackError> {
    let Some(ports) = places.get(place) else {
        return Err(StackError::NotReady("a place for an engine", String::new()));
    };
    let pairs = [
        ("--model-dir", options.model_dir.display().to_string()),
        ("--name", name_of(id)),
        ("--model-name", model.to_owned()),
        ("--port", ports.http.to_string()),
        ("--events-port", ports.events.to_string()),
        ("--replay-port", ports.replay.to_string()),
        ("--blocks", BLOCKS.to_string()),
        ("--prefill-us-per-token", "20".to_owned()),
        ("--decode-us-per-token", "500".to_owned()),
    ];
    let mut arguments: Vec<String> =
        pairs.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect();
    if place == ADAPTER_PLACE {
        arguments.extend(["--lora".to_owned(), ADAPTER.to_owned()]);
    }
    let program = options.program("engine-sim");
    let mut child = Child::start(&name_of(id), &program, &arguments, folder)?;
    wait_until_ok("an engine's /health", &mut child, ports.http, "/health").await?;
    Ok(Member { id, place, model, role: "aggregated", child })
}

/// Writes the worker list in one step: nobody reads half of it.
fn write_list(folder: &Path, places: &[EnginePorts], members: &[Member]) -> std::io::Result<()> {
    let mut list = String::from("workers:\n");
    for Member { id, place, model, role, .. } in members {
        let Some(EnginePorts { http, events, replay }) = places.get(*place) else { continue };
        let adapters = if *place == ADAPTER_PLACE {
            format!(", adapters: [{ADAPTER}]")
        } else {
            String::new()
        };
        list.push_str(&format!(
            "  - {{id: {id}, model: {model}, role: {role}, endpoint: \"127.0.0.1:{http}\", \
             kv_events: \"tcp://127.0.0.1:{events}\", replay: \"tcp://127.0.0.1:{replay}\"{adapters}}}\n"
        ));
    }
    if members.is_empty() {
        list = "workers: []\n".to_owned();
    }
    let draft = folder.join("workers.yaml.draft");
    std::fs::write(&draft, list)?;
    std::fs::rename(draft, folder.join("workers.yaml"))
}

async fn is_idle(port: u16) -> bool {
    let state = get(&local(port), "/control/state").await.ok().and_then(|answer| answer.json());
    let number = |state: &Value, key| state.get(key).and_then(Value::as_u64);
    state.is_some_and(|state| {
        number(&state, "running") == Some(0) && number(&state, "waiting") == Some(0)
    })
}

/// Waits until something holds; returns how long that took.
///
/// # Errors
///
/// [`StackError::NotReady`].
pub async fn timed<F>(
    what: &'static str,
    mut holds: impl FnMut() -> F,
) -> Result<Duration, StackError>
where
    F: Future<Output = bool>,
{
    let started = Instant::now();
    while !holds().await {
        if started.elapsed() > READY_WITHIN {
            return Err(StackError::NotReady(what, String::new()));
        }
        sleep(POLL).await;
    }
    Ok(started.elapsed())
}

async fn until<F>(what: &'static str, holds: impl FnMut() -> F) -> Result<(), StackError>
where
    F: Future<Output = bool>,
{
    timed(what, holds).await.map(|_| ())
}
