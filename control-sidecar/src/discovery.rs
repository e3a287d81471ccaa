//! Discovery: which workers there are, from a list or from a backend.
//!
//! ```text
//! backend ──► listing ──join──► fleet ──► keeper
//! ```
//!
//! Whatever fails, the last fleet stays: a backend that cannot be asked says
//! nothing about its workers.

#[cfg(test)]
pub(crate) mod captures;
pub mod card;
pub mod cluster;
pub mod drive;
pub mod etcd;
pub mod file;
pub mod join;
pub mod kubernetes;
pub mod listing;
pub mod pods;
pub mod probe;
pub mod record;
#[cfg(test)]
pub(crate) mod stand_in;
pub mod watching;

use std::path::Path;

use tokio::sync::mpsc;
use tokio::time::sleep;

use crate::config::workers::WorkerList;
use crate::config::{ModelConfig, WorkerSource};
use crate::fleet::{Fleet, ModelFiles, ModelSpec};
use crate::limits::{CONFIG_BYTES_MAX, WORKERS_FILE_EVERY};

/// What a look at the worker list gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListEvent {
    /// A fleet to take over, the whole of it.
    Taken(Fleet),
    /// The list cannot be read, or has mistakes; the old one stays.
    Refused(String),
}

/// Tells of the workers and of their changes until nobody listens.
///
/// - `brokers`: whether events come over ZMQ brokers.
pub async fn watch(
    source: WorkerSource,
    models: Vec<ModelConfig>,
    brokers: bool,
    lists: mpsc::Sender<ListEvent>,
) {
    let path = match source {
        WorkerSource::Inline(list) => {
            // Nobody listens any more: nothing to do.
            let _ = lists.send(ListEvent::Taken(listed(list, &models))).await;
            lists.closed().await;
            return;
        }
        WorkerSource::File(path) => path,
        WorkerSource::Discovery(config) => return drive::run(config, models, brokers, lists).await,
    };
    let mut seen = None;
    while !lists.is_closed() {
        // Contents, not times: files behind links (as Kubernetes mounts them)
        // change in ways that times do not show.
        let text = read_bounded(&path).await;
        if seen.as_ref() != Some(&text) {
            let event = look(&path, &text, &models);
            if lists.send(event).await.is_err() {
                return;
            }
            seen = Some(text);
        }
        sleep(WORKERS_FILE_EVERY).await;
    }
}

fn look(path: &Path, text: &Result<String, String>, models: &[ModelConfig]) -> ListEvent {
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let list = match text {
        Err(error) => return ListEvent::Refused(format!("{name}: {error}")),
        Ok(text) => WorkerList::parse(text, models),
    };
    match list {
        Ok(list) => ListEvent::Taken(listed(list, models)),
        Err(mistakes) => ListEvent::Refused(format!("{name}: {mistakes}")),
    }
}

/// The fleet of a worker list, with the models of the configuration.
fn listed(list: WorkerList, models: &[ModelConfig]) -> Fleet {
    Fleet {
        models: models.iter().map(spec).collect(),
        ranks: list.ranks,
        adapters: list.adapters,
        load_streams: list.load_streams,
        ..Fleet::default()
    }
}

fn spec(model: &ModelConfig) -> ModelSpec {
    ModelSpec {
        name: model.name.clone(),
        aliases: model.aliases.clone(),
        files: ModelFiles::Directory(model.directory.clone()),
        block_size: model.block_size,
        context_length: 0,
        eagle: model.eagle,
        engine: model.engine,
        hf_tokenizers: model.hf_tokenizers,
    }
}

/// Reads a text file of at most [`CONFIG_BYTES_MAX`].
///
/// # Errors
///
/// What is wrong with it, in words.
pub async fn read_bounded(path: &Path) -> Result<String, String> {
    let length = tokio::fs::metadata(path).await.map_err(|error| error.to_string())?.len();
    if length > CONFIG_BYTES_MAX {
        return Err(format!("longer than {CONFIG_BYTES_MAX} bytes"));
    }
    tokio::fs::read_to_string(path).await.map_err(|error| error.to_string())
}
