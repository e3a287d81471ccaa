//! Session: which headers name the session that a request belongs to.

use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::{Refusal, SessionKey};
use crate::limits::SESSION_ID_BYTES_MAX;

/// Seed of the key of one session, and of that of all children of one.
const OWN_SEED: u64 = 0;
const GROUP_SEED: u64 = 1;

impl SessionKey {
    /// The key of a session.
    #[must_use]
    pub fn of(id: &str) -> Self {
        Self(xxh3_128_with_seed(id.as_bytes(), OWN_SEED))
    }

    /// The key that all children of a session share: they go where the first of
    /// them went. It is not the parent's own.
    #[must_use]
    pub fn of_children(parent: &str) -> Self {
        Self(xxh3_128_with_seed(parent.as_bytes(), GROUP_SEED))
    }
}

/// How one kind of client names its sessions.
struct Names {
    session: &'static str,
    /// Names a session within that one.
    child: Option<&'static str>,
    parent: &'static str,
    /// Whether a child's parent is `session` unless `parent` says otherwise, and
    /// a session without a child has no parent.
    nests: bool,
}

/// In the order in which they are looked for.
const NAMES: [Names; 4] = [
    Names {
        session: "x-dynamo-session-id",
        child: None,
        parent: "x-dynamo-parent-session-id",
        nests: false,
    },
    Names {
        session: "x-claude-code-session-id",
        child: Some("x-claude-code-agent-id"),
        parent: "x-claude-code-parent-agent-id",
        nests: true,
    },
    Names { session: "thread-id", child: None, parent: "x-codex-parent-thread-id", nests: false },
    Names { session: "x-session-id", child: None, parent: "x-parent-session-id", nests: false },
];

/// The session of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Session {
    /// Its own key, or why it has none.
    own: Result<SessionKey, Refusal>,
    /// The key of its parent's children, if it has a parent.
    group: Option<SessionKey>,
}

impl Session {
    /// - `first`: the first value of a header.
    pub(super) fn read<'a>(first: impl Fn(&str) -> Option<&'a str>) -> Option<Self> {
        // A value that is blank or not plain text is none at all.
        let text = |name: &str| {
            let value = first(name)?;
            let is_plain = value.bytes().all(|byte| matches!(byte, b'\t' | b' '..=b'~'));
            Some(value.trim()).filter(|value| is_plain && !value.is_empty())
        };
        NAMES.iter().find_map(|names| {
            let root = text(names.session)?;
            let child = names.child.and_then(|name| Some((name, text(name)?)));
            let (header, id) = child.unwrap_or((names.session, root));
            let is_nested = id != root;
            let parent = text(names.parent)
                .filter(|parent| *parent != id && (is_nested || !names.nests))
                .or((names.nests && is_nested).then_some(root));
            let own = if id.len() > SESSION_ID_BYTES_MAX {
                Err(Refusal::SessionTooLong(header))
            } else {
                Ok(SessionKey::of(id))
            };
            Some(Self { own, group: parent.map(SessionKey::of_children) })
        })
    }

    /// The key under which its worker is remembered.
    ///
    /// - `is_pinned`: whether the request names a worker: it then stands for
    ///   itself alone.
    pub(super) fn key(self, is_pinned: bool) -> Result<SessionKey, Refusal> {
        match self.group {
            Some(group) if !is_pinned => Ok(group),
            _ => self.own,
        }
    }
}
