//! Loader: gets a model's files, from a directory or from where a model card
//! says they are, and loads them, again and again until it can.

use std::path::{Path, PathBuf};

use futures::StreamExt;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tracing::warn;
use warmpath_core::limits::TOKENIZER_BYTES_MAX;

use super::cache::Cache;
use super::{LoadedModel, load};
use crate::fleet::{Artifact, ModelFiles, ModelSpec};
use crate::limits::{COPY_CHUNK_BYTES, FETCH_RETRY_PAUSE, FETCH_TIMEOUT};

/// Why a model's files cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchError {
    /// The model card names a place that is neither a path nor `http://`.
    Location,
    /// Nobody answers there, or not in time.
    Unreachable,
    /// The answer is another status than 200.
    Status,
    /// The file is longer than any tokenizer.
    TooLong,
    /// The bytes are not those that the card was published with.
    Checksum,
    /// This host cannot read or write it.
    Disk,
    /// Loading broke off.
    Internal,
}

impl FetchError {
    /// Fixed word for metrics and the state page.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Location => "location",
            Self::Unreachable => "unreachable",
            Self::Status => "status",
            Self::TooLong => "too_long",
            Self::Checksum => "checksum",
            Self::Disk => "disk",
            Self::Internal => "internal",
        }
    }
}

/// What came of one attempt.
#[derive(Debug)]
pub struct Attempt {
    /// The model's number.
    pub number: u16,
    /// What was loaded: by then the number may stand for another model.
    pub spec: ModelSpec,
    /// The model, or why there is none yet.
    pub outcome: Result<LoadedModel, FetchError>,
}

/// Loads models in tasks of their own.
#[derive(Clone, Debug)]
pub struct Loader {
    cache: Cache,
    client: reqwest::Client,
    attempts: mpsc::Sender<Attempt>,
}

impl Loader {
    /// - `cache`: where compiled tokenizers are kept.
    /// - `attempts`: who is told.
    #[must_use]
    pub fn new(cache: Cache, attempts: mpsc::Sender<Attempt>) -> Self {
        // A card's word is followed, a server's that it names is not.
        let client = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none());
        Self { cache, client: client.build().unwrap_or_default(), attempts }
    }

    /// Loads a model until it is loaded, or the task is aborted.
    #[must_use]
    pub fn start(&self, number: u16, spec: ModelSpec) -> AbortHandle {
        let loader = self.clone();
        tokio::spawn(async move { loader.run(number, spec).await }).abort_handle()
    }

    async fn run(self, number: u16, spec: ModelSpec) {
        let mut pause = FETCH_RETRY_PAUSE.0;
        loop {
            let outcome = self.attempt(&spec).await;
            let error = outcome.as_ref().err().copied();
            let attempt = Attempt { number, spec: spec.clone(), outcome };
            if self.attempts.send(attempt).await.is_err() {
                return;
            }
            let Some(error) = error else { return };
            warn!(model = spec.name, reason = error.reason(), "the model's files cannot be had");
            sleep(pause).await;
            pause = (pause * 2).min(FETCH_RETRY_PAUSE.1);
        }
    }

    async fn attempt(&self, spec: &ModelSpec) -> Result<LoadedModel, FetchError> {
        let files = self.files(&spec.files).await?;
        let (spec, cache) = (spec.clone(), self.cache.clone());
        tokio::task::spawn_blocking(move || load(&spec, files.path(), &cache))
            .await
            .map_err(|_| FetchError::Internal)
    }

    async fn files(&self, files: &ModelFiles) -> Result<Files, FetchError> {
        match files {
            ModelFiles::Directory(path) => Ok(Files::Given(path.clone())),
            ModelFiles::Artifacts(artifacts) => {
                let directory = tempfile::tempdir().map_err(|_| FetchError::Disk)?;
                for artifact in artifacts {
                    let path = directory.path().join(artifact.file_name);
                    timeout(FETCH_TIMEOUT, self.fetch(artifact, &path))
                        .await
                        .map_err(|_| FetchError::Unreachable)??;
                }
                Ok(Files::Fetched(directory))
            }
        }
    }

    async fn fetch(&self, artifact: &Artifact, path: &Path) -> Result<(), FetchError> {
        let location = &artifact.location;
        let hash = if location.starts_with("http://") {
            self.download(location, path).await?
        } else if Path::new(location).is_absolute() {
            copy(Path::new(location), path).await?
        } else {
            return Err(FetchError::Location);
        };
        let wanted = artifact.blake3.as_ref();
        if wanted.is_some_and(|wanted| !hash.to_hex().eq_ignore_ascii_case(wanted)) {
            return Err(FetchError::Checksum);
        }
        Ok(())
    }

    async fn download(&self, url: &str, path: &Path) -> Result<blake3::Hash, FetchError> {
        let response = self.client.get(url).send().await.map_err(|_| FetchError::Unreachable)?;
        if response.status() != reqwest::StatusCode::OK {
            return Err(FetchError::Status);
        }
        let mut sink = Sink::create(path).await?;
        let mut chunks = response.bytes_stream();
        while let Some(chunk) = chunks.next().await {
            sink.write(&chunk.map_err(|_| FetchError::Unreachable)?).await?;
        }
        sink.finish().await
    }
}

async fn copy(from: &Path, to: &Path) -> Result<blake3::Hash, FetchError> {
    // A pipe or a device that a card names would never end.
    let about = tokio::fs::metadata(from).await.map_err(|_| FetchError::Disk)?;
    if !about.is_file() {
        return Err(FetchError::Disk);
    }
    let mut file = tokio::fs::File::open(from).await.map_err(|_| FetchError::Disk)?;
    let mut sink = Sink::create(to).await?;
    let mut chunk = vec![0; COPY_CHUNK_BYTES];
    loop {
        let len = file.read(&mut chunk).await.map_err(|_| FetchError::Disk)?;
        if len == 0 {
            return sink.finish().await;
        }
        sink.write(chunk.get(..len).unwrap_or_default()).await?;
    }
}

/// A file that is being written, and hashed while it is.
struct Sink {
    file: tokio::fs::File,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl Sink {
    async fn create(path: &Path) -> Result<Self, FetchError> {
        let file = tokio::fs::File::create(path).await.map_err(|_| FetchError::Disk)?;
        Ok(Self { file, hasher: blake3::Hasher::new(), bytes: 0 })
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), FetchError> {
        self.bytes += bytes.len() as u64;
        if self.bytes > TOKENIZER_BYTES_MAX {
            return Err(FetchError::TooLong);
        }
        self.hasher.update(bytes);
        self.file.write_all(bytes).await.map_err(|_| FetchError::Disk)
    }

    async fn finish(mut self) -> Result<blake3::Hash, FetchError> {
        self.file.flush().await.map_err(|_| FetchError::Disk)?;
        Ok(self.hasher.finalize())
    }
}

/// A model's files, as long as they are needed.
enum Files {
    Given(PathBuf),
    Fetched(TempDir),
}

impl Files {
    fn path(&self) -> &Path {
        match self {
            Self::Given(path) => path,
            Self::Fetched(directory) => directory.path(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::CompletionEngine;
    use axum::Router;
    use axum::http::StatusCode;
    use axum::routing::get;

    const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/models/tiny");

    fn spec(artifacts: Vec<Artifact>) -> ModelSpec {
        ModelSpec {
            name: "tiny".into(),
            aliases: Vec::new(),
            files: ModelFiles::Artifacts(artifacts),
            block_size: 16,
            context_length: 0,
            eagle: false,
            engine: CompletionEngine::Dynamo,
            hf_tokenizers: false,
        }
    }

    fn artifact(file_name: &'static str, location: String) -> Artifact {
        let bytes = std::fs::read(Path::new(TINY).join(file_name)).unwrap();
        Artifact { file_name, location, blake3: Some(blake3::hash(&bytes).to_hex().to_string()) }
    }

    /// Serves the tiny model's files, and nothing else.
    async fn server() -> String {
        let file = |name: &str| {
            let bytes = std::fs::read(Path::new(TINY).join(name)).unwrap();
            get(move || async move { bytes })
        };
        let router = Router::new()
            .route("/tokenizer.json", file("tokenizer.json"))
            .fallback(|| async { StatusCode::NOT_FOUND });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        format!("http://{address}")
    }

    async fn attempt(artifacts: Vec<Artifact>) -> Result<LoadedModel, FetchError> {
        let (attempts, _unused) = mpsc::channel(1);
        Loader::new(Cache::default(), attempts).attempt(&spec(artifacts)).await
    }

    /// Goal: a model whose card names files elsewhere is the model whose files
    /// are at hand.
    #[tokio::test]
    async fn files_are_fetched_and_give_the_same_card() {
        let base = server().await;
        let fetched = attempt(vec![
            artifact("tokenizer.json", format!("{base}/tokenizer.json")),
            artifact("chat_template.jinja", format!("{TINY}/chat_template.jinja")),
        ])
        .await
        .unwrap();
        let given = load(&spec(Vec::new()), Path::new(TINY), &Cache::default());
        assert_eq!(fetched.card.tokenizer, given.card.tokenizer);
        assert_eq!(fetched.card.templates, given.card.templates);
        assert!(fetched.tokenizer.is_some());
    }

    #[tokio::test]
    async fn what_is_not_the_file_of_the_card_is_refused() {
        let base = server().await;
        let good = artifact("tokenizer.json", format!("{base}/tokenizer.json"));
        let cases = [
            (Artifact { blake3: Some("00".into()), ..good.clone() }, FetchError::Checksum),
            (Artifact { location: format!("{base}/none"), ..good.clone() }, FetchError::Status),
            (Artifact { location: "Qwen/Qwen3".into(), ..good.clone() }, FetchError::Location),
            (Artifact { location: "/no/such/file".into(), ..good.clone() }, FetchError::Disk),
            (Artifact { location: "/dev/zero".into(), ..good.clone() }, FetchError::Disk),
            (
                Artifact { location: "http://127.0.0.1:9/none".into(), ..good },
                FetchError::Unreachable,
            ),
        ];
        for (artifact, expected) in cases {
            assert_eq!(attempt(vec![artifact]).await.err(), Some(expected));
        }
    }
}
