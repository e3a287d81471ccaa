//! Socket: a Unix socket that only those with its mode can use.

use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

use tokio::net::{UnixListener, UnixStream};

/// Binds a Unix socket. One that nobody listens at any more is replaced.
///
/// - `mode`: who may use it, as a file's mode.
///
/// # Errors
///
/// If somebody listens there, if there is something else, or if the socket cannot
/// be made.
pub async fn bind(path: &Path, mode: u32) -> Result<UnixListener> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(Error::new(ErrorKind::AlreadyExists, "is there, and no socket"));
        }
        Ok(_) if UnixStream::connect(path).await.is_ok() => {
            return Err(Error::new(ErrorKind::AddrInUse, "somebody listens there"));
        }
        _ => {}
    }
    // Made beside it and renamed: at its name it has its mode from the start.
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}", std::process::id()));
    let beside = Path::new(&beside);
    let listener = UnixListener::bind(beside)?;
    let named = std::fs::set_permissions(beside, std::fs::Permissions::from_mode(mode))
        .and_then(|()| std::fs::rename(beside, path));
    if named.is_err() {
        // Nobody has seen it.
        let _ = std::fs::remove_file(beside);
    }
    named.map(|()| listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_has_its_mode_and_takes_the_place_of_a_dead_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("feed.sock");
        for mode in [0o600, 0o660] {
            let listener = bind(&path, mode).await.unwrap();
            let found = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
            assert_eq!(found, mode);
            UnixStream::connect(&path).await.unwrap();
            let twice = bind(&path, mode).await.unwrap_err();
            assert_eq!(twice.kind(), ErrorKind::AddrInUse);
            drop(listener);
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left");
        let file = folder.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        assert_eq!(bind(&file, 0o600).await.unwrap_err().kind(), ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    }
}
