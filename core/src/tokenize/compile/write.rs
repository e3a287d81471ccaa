//! Lays out sections as a tokenizer file; see `tokenize::file`.

use crate::tokenize::file::{
    CHECKED_AT, Kind, MAGIC, SECTIONS, Section, TABLE_AT, TABLE_ENTRY, VERSION,
};

/// The contents of a file before it is laid out.
pub(super) struct Writer {
    kind: Kind,
    flags: u32,
    sections: Vec<Vec<u8>>,
}

impl Writer {
    pub(super) fn new(kind: Kind, flags: u32) -> Self {
        Self { kind, flags, sections: vec![Vec::new(); SECTIONS] }
    }

    /// Sets the bytes of a section.
    pub(super) fn bytes(&mut self, section: Section, bytes: Vec<u8>) {
        if let Some(to) = self.sections.get_mut(section as usize) {
            *to = bytes;
        }
    }

    /// Sets a section of 16-bit numbers.
    pub(super) fn u16s(&mut self, section: Section, numbers: &[u16]) {
        self.bytes(section, numbers.iter().flat_map(|number| number.to_le_bytes()).collect());
    }

    /// Sets a section of 32-bit numbers.
    pub(super) fn u32s(&mut self, section: Section, numbers: &[u32]) {
        self.bytes(section, numbers.iter().flat_map(|number| number.to_le_bytes()).collect());
    }

    /// Sets a section of 64-bit numbers.
    pub(super) fn u64s(&mut self, section: Section, numbers: &[u64]) {
        self.bytes(section, numbers.iter().flat_map(|number| number.to_le_bytes()).collect());
    }

    /// The file. `None` if it would be longer than 4 GiB.
    pub(super) fn finish(self) -> Option<Vec<u8>> {
        let mut file = Vec::new();
        file.extend(MAGIC);
        file.extend(VERSION.to_le_bytes());
        file.extend((self.kind as u32).to_le_bytes());
        file.extend([0; 16]);
        file.extend(self.flags.to_le_bytes());
        file.extend(u32::try_from(SECTIONS).ok()?.to_le_bytes());
        let mut start = (TABLE_AT + SECTIONS * TABLE_ENTRY).next_multiple_of(8);
        for section in &self.sections {
            file.extend(u32::try_from(start).ok()?.to_le_bytes());
            file.extend(u32::try_from(section.len()).ok()?.to_le_bytes());
            start = (start + section.len()).next_multiple_of(8);
        }
        for section in &self.sections {
            file.resize(file.len().next_multiple_of(8), 0);
            file.extend(section);
        }
        u32::try_from(file.len()).ok()?;
        seal(&mut file);
        Some(file)
    }
}

/// Writes the length and the checksum into a file that has a whole header.
pub(super) fn seal(file: &mut [u8]) {
    let len = (file.len() as u64).to_le_bytes();
    if let Some(to) = file.get_mut(16..24) {
        to.copy_from_slice(&len);
    }
    let checksum = xxhash_rust::xxh3::xxh3_64(file.get(CHECKED_AT..).unwrap_or_default());
    if let Some(to) = file.get_mut(24..32) {
        to.copy_from_slice(&checksum.to_le_bytes());
    }
}
