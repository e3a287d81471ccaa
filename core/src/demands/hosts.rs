//! Hosts: the subset hint by which a gateway narrows the workers.

use core::net::IpAddr;

use super::Host;
use crate::limits::SUBSET_HOSTS_MAX;
use crate::wire::Reader;

/// What the gateway allows, from the metadata `envoy.lb.subset_hint`.
///
/// An entry that is no address matches no worker, as in Dynamo's pickers; so a
/// hint of nothing else allows none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SubsetHint {
    /// The hosts.
    pub hosts: Vec<Host>,
    /// Entries that are no address, and those beyond
    /// [`SUBSET_HOSTS_MAX`].
    pub malformed: u32,
}

impl SubsetHint {
    /// Reads the hint as the host's property call hands it over: a list in the
    /// ABI's form of pairs, with the items for names, or one text with commas.
    /// Anything else is one malformed entry.
    #[must_use]
    pub fn parse(property: &[u8]) -> Self {
        let mut hint = Self::default();
        if let Some(items) = list(property) {
            items.for_each(|item| hint.add(item));
        } else if let Ok(text) = core::str::from_utf8(property) {
            let items = text.split(',').filter(|item| !item.trim().is_empty());
            items.for_each(|item| hint.add(item.as_bytes()));
        } else {
            hint.malformed = 1;
        }
        hint
    }

    /// The same from its items, for those who get them one by one; `None` stands
    /// for one that is no text.
    #[must_use]
    pub fn of<'a>(items: impl Iterator<Item = Option<&'a str>>) -> Self {
        let mut hint = Self::default();
        items.for_each(|item| hint.add(item.unwrap_or_default().as_bytes()));
        hint
    }

    fn add(&mut self, item: &[u8]) {
        let host = core::str::from_utf8(item).ok().and_then(|text| host(text.trim()));
        match host {
            Some(host) if self.hosts.len() < SUBSET_HOSTS_MAX => self.hosts.push(host),
            _ => self.malformed = self.malformed.saturating_add(1),
        }
    }
}

/// `ip:port`, or an address alone; IPv6 with a port in brackets.
fn host(text: &str) -> Option<Host> {
    if let Ok(socket) = text.parse() {
        return Some(Host::Socket(socket));
    }
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    bare.parse::<IpAddr>().ok().map(Host::Address)
}

/// The names of a list of pairs; `None` if the bytes are not exactly one. A text
/// of addresses never is, for its length would be that of a list of millions.
fn list(bytes: &[u8]) -> Option<impl Iterator<Item = &[u8]>> {
    let mut lengths = Reader::new(bytes);
    let count = usize::try_from(lengths.u32().ok()?).ok()?;
    let mut texts = lengths;
    texts.take(count.checked_mul(8)?).ok()?;
    let mut names = Vec::new();
    for _ in 0..count {
        let mut text = || {
            let len = usize::try_from(lengths.u32().ok()?).ok()?;
            let text = texts.take(len).ok()?;
            texts.u8().ok()?;
            Some(text)
        };
        let name = text()?;
        text()?;
        names.push(name);
    }
    texts.is_empty().then(|| names.into_iter())
}
