//! Child: processes that do not outlive this one.
//!
//! # Invariants
//!
//! 1. A child is killed when its handle is dropped, and, on Linux, by the kernel
//!    when this process dies in whatever way. The kernel ties a child to the
//!    *thread* that started it, so children are started from the main thread
//!    only (`warmpath-run` has no other).
//! 2. A child is in a process group of its own: Ctrl-C at the terminal reaches
//!    this process alone, which then stops the children in order.
//! 3. What a child prints goes to its log.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{sleep, timeout};

use super::limits::{LOG_TAIL_BYTES, POLL, STOP_WITHIN};

/// A running process.
pub struct Child {
    name: String,
    log: PathBuf,
    process: tokio::process::Child,
}

impl Child {
    /// Starts `program` with `arguments`; its output goes to `NAME.log` in
    /// `folder`, appended if the log is there.
    ///
    /// # Errors
    ///
    /// If the log cannot be written or the program not be started.
    pub fn start(
        name: &str,
        program: &Path,
        arguments: &[String],
        folder: &Path,
    ) -> io::Result<Self> {
        Self::start_with(name, program, arguments, &[], folder)
    }

    /// The same, with variables added to its environment.
    ///
    /// # Errors
    ///
    /// As [`Child::start`].
    pub fn start_with(
        name: &str,
        program: &Path,
        arguments: &[String],
        environment: &[(&str, String)],
        folder: &Path,
    ) -> io::Result<Self> {
        let log = folder.join(format!("{name}.log"));
        let output = File::options().create(true).append(true).open(&log)?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .envs(environment.iter().map(|(name, value)| (*name, value)))
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0)
            .kill_on_drop(true);
        die_with_parent(&mut command);
        Ok(Self { name: name.into(), log, process: command.spawn()? })
    }

    /// Name given at the start.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Process id; `None` once it has ended and was noticed.
    #[must_use]
    pub fn id(&self) -> Option<u32> {
        self.process.id()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.process.try_wait().ok().flatten()
    }

    /// Asks it to end and waits; kills it if it does not.
    pub async fn stop(mut self) {
        self.signal(Signal::SIGTERM);
        if timeout(STOP_WITHIN, self.process.wait()).await.is_err() {
            self.kill_now().await;
        }
    }

    /// Kills it without warning and waits until it is gone.
    pub async fn kill_now(&mut self) {
        // An error means that it is gone already.
        let _gone = self.process.kill().await;
    }

    /// The end of what it printed.
    #[must_use]
    pub fn log_tail(&self) -> String {
        log_tail(&self.log).unwrap_or_default()
    }

    fn signal(&self, signal: Signal) {
        if let Some(id) = self.process.id().and_then(|id| i32::try_from(id).ok()) {
            // An error means that it is gone already.
            let _gone = kill(Pid::from_raw(id), signal);
        }
    }
}

/// Returns when the program is asked to end: by Ctrl-C or SIGTERM.
pub async fn asked_to_stop() {
    let Ok(mut terminate) = signal(SignalKind::terminate()) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}

/// Waits until every child that was killed is gone from the process table too,
/// for as long as one gets to stop.
pub async fn reap() {
    let deadline = Instant::now() + STOP_WITHIN;
    // An error says that there is no child.
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
        if status == WaitStatus::StillAlive {
            if Instant::now() > deadline {
                return;
            }
            sleep(POLL).await;
        }
    }
}

fn log_tail(log: &Path) -> io::Result<String> {
    let mut file = File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "the only way to run code in the child before its program starts")]
fn die_with_parent(command: &mut Command) {
    let parent = nix::unistd::getpid();
    // SAFETY: the closure runs in the child after fork; it makes two system
    // calls and neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(move || {
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
            if nix::unistd::getppid() == parent {
                Ok(())
            } else {
                // The parent died before the call above.
                Err(io::ErrorKind::Interrupted.into())
            }
        });
    }
}

#[cfg(not(target_os = "linux"))]
fn die_with_parent(_command: &mut Command) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_child_is_stopped_and_its_output_kept() {
        let folder = tempfile::tempdir().unwrap();
        let arguments = ["-c".into(), "echo ready; exec sleep 600".into()];
        let mut child =
            Child::start("sleeper", Path::new("/bin/sh"), &arguments, folder.path()).unwrap();
        let id = i32::try_from(child.id().unwrap()).unwrap();
        while !child.log_tail().contains("ready") {
            assert!(child.ended().is_none());
            tokio::task::yield_now().await;
        }
        child.stop().await;
        assert!(kill(Pid::from_raw(id), None).is_err(), "the process is still there");
    }
}
