//! Credentials: secrets and certificates in files that others replace.
//!
//! # Invariants
//!
//! 1. What is in force was whole and valid once: files that cannot be read or
//!    do not fit together are counted and logged, and change nothing.
//! 2. No content of a file is in an error, a log or a metric.

pub mod token;

use core::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::io::AsyncReadExt;
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::limits::{CREDENTIAL_BYTES_MAX, CREDENTIALS_EVERY};
use crate::metrics::Metrics;

/// Why files are not taken over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CredentialError {
    /// A file cannot be read.
    Unreadable(PathBuf, io::ErrorKind),
    /// A file is longer than [`CREDENTIAL_BYTES_MAX`].
    TooLong(PathBuf),
    /// The certificate's file holds none.
    NoCertificate,
    /// A certificate cannot be used.
    BadCertificate,
    /// The key's file holds none that can be used.
    BadKey,
    /// The key is not the certificate's.
    KeyMismatch,
    /// The authorities' file holds none that can be used.
    NoAuthority,
    /// The token's file holds none, too many, or one that is too short, too long
    /// or has odd characters.
    BadToken,
}

impl CredentialError {
    /// Fixed word for metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unreadable(..) => "unreadable",
            Self::TooLong(_) => "too_long",
            Self::NoCertificate => "no_certificate",
            Self::BadCertificate => "bad_certificate",
            Self::BadKey => "bad_key",
            Self::KeyMismatch => "key_mismatch",
            Self::NoAuthority => "no_authority",
            Self::BadToken => "bad_token",
        }
    }
}

impl fmt::Display for CredentialError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable(path, kind) => write!(f, "{}: {kind}", path.display()),
            Self::TooLong(path) => {
                write!(f, "{}: longer than {CREDENTIAL_BYTES_MAX} bytes", path.display())
            }
            Self::NoCertificate => f.write_str("no certificate in its file"),
            Self::BadCertificate => f.write_str("a certificate cannot be used"),
            Self::BadKey => f.write_str("no usable private key in its file"),
            Self::KeyMismatch => f.write_str("the private key is not the certificate's"),
            Self::NoAuthority => f.write_str("no usable certificate of an authority in its file"),
            Self::BadToken => f.write_str(
                "a token has 16 to 4096 visible ASCII characters, one a line, at most 8 lines",
            ),
        }
    }
}

impl std::error::Error for CredentialError {}

/// Something made from files, as they were when they were last good.
#[derive(Debug)]
pub struct Reloaded<T>(watch::Receiver<Arc<T>>);

impl<T> Clone for Reloaded<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: Send + Sync + 'static> Reloaded<T> {
    /// Something that stays as it is.
    #[must_use]
    pub fn fixed(value: T) -> Self {
        Self(watch::channel(Arc::new(value)).1)
    }

    /// Reads files, and again whenever they change until `stop`.
    ///
    /// Looked at by content, so that it does not matter how they are replaced;
    /// Kubernetes exchanges a link to their folder. Between the replacements of a
    /// certificate and of its key the two do not fit, and the old pair stays.
    ///
    /// - `what`: what the log calls it.
    /// - `read`: makes it of the files' contents, in their order.
    ///
    /// # Errors
    ///
    /// If the files are not good at the start.
    pub async fn start(
        what: &'static str,
        files: Vec<PathBuf>,
        read: impl Fn(&[Vec<u8>]) -> Result<T, CredentialError> + Send + 'static,
        metrics: Arc<Metrics>,
        stop: CancellationToken,
    ) -> Result<Self, CredentialError> {
        let mut seen = contents(&files).await;
        let first = seen.clone().and_then(|contents| read(&contents))?;
        let (sender, receiver) = watch::channel(Arc::new(first));
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = sleep(CREDENTIALS_EVERY) => {}
                    () = stop.cancelled() => return,
                    () = sender.closed() => return,
                }
                let now = contents(&files).await;
                if now == seen {
                    continue;
                }
                seen = now;
                match seen.clone().and_then(|contents| read(&contents)) {
                    Ok(value) => {
                        sender.send_replace(Arc::new(value));
                        metrics.credentials_read("taken");
                        info!(what, "credentials were replaced");
                    }
                    Err(error) => {
                        metrics.credentials_read(error.reason());
                        warn!(what, %error, "credentials are kept as they were");
                    }
                }
            }
        });
        Ok(Self(receiver))
    }

    /// As it is now.
    #[must_use]
    pub fn get(&self) -> Arc<T> {
        Arc::clone(&self.0.borrow())
    }
}

async fn contents(files: &[PathBuf]) -> Result<Vec<Vec<u8>>, CredentialError> {
    let mut contents = Vec::with_capacity(files.len());
    for path in files {
        let bytes = bounded(path).await;
        let bytes =
            bytes.map_err(|error| CredentialError::Unreadable(path.clone(), error.kind()))?;
        if bytes.len() as u64 > CREDENTIAL_BYTES_MAX {
            return Err(CredentialError::TooLong(path.clone()));
        }
        contents.push(bytes);
    }
    Ok(contents)
}

/// A file, or one byte more than it may have.
async fn bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = tokio::fs::File::open(path).await?;
    file.take(CREDENTIAL_BYTES_MAX + 1).read_to_end(&mut bytes).await?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::{Duration, Instant};

    async fn until(holds: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !holds() {
            assert!(Instant::now() < deadline, "never");
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Goal: what is good replaces what was, what is not is counted and changes
    /// nothing.
    #[tokio::test]
    async fn only_good_files_replace_what_is_in_force() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("number");
        let read = |contents: &[Vec<u8>]| {
            let text = str::from_utf8(&contents[0]).map_err(|_| CredentialError::BadToken)?;
            text.trim().parse::<u32>().map_err(|_| CredentialError::BadToken)
        };
        let metrics = Arc::new(Metrics::new());
        let start = || {
            let stop = CancellationToken::new();
            Reloaded::start("number", vec![file.clone()], read, Arc::clone(&metrics), stop)
        };
        let missing = CredentialError::Unreadable(file.clone(), io::ErrorKind::NotFound);
        assert_eq!(start().await.unwrap_err(), missing);
        std::fs::write(&file, "1").unwrap();
        let number = start().await.unwrap();
        assert_eq!(*number.get(), 1);
        let long = vec![b' '; usize::try_from(CREDENTIAL_BYTES_MAX).unwrap() + 1];
        for (content, counted) in [(&b"x"[..], "bad_token"), (&long, "too_long"), (b"2", "taken")] {
            std::fs::write(folder.path().join("new"), content).unwrap();
            std::fs::rename(folder.path().join("new"), &file).unwrap();
            let line = format!("warmpath_credential_reloads_total{{outcome=\"{counted}\"}} 1");
            until(|| metrics.page().contains(&line)).await;
            assert_eq!(*number.get(), if counted == "taken" { 2 } else { 1 });
        }
        std::fs::remove_file(&file).unwrap();
        until(|| metrics.page().contains("outcome=\"unreadable\"} 1")).await;
        assert_eq!(*number.get(), 2);
    }
}
