//! Listing: all records that a backend has, and who wrote them.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use super::record::{Key, Record, RecordError};
use crate::fleet::Problem;
use crate::limits::{FLEET_PROBLEMS_MAX, PROBLEM_NAME_BYTES_MAX, RECORDS_MAX};

/// Who wrote a record, as far as the backend itself says so.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Author {
    /// The instance that wrote the record; `None` if the backend does not say.
    pub instance: Option<u64>,
    /// Whether the backend lets nobody write for another: then a record that
    /// names another instance is a foreign one, and dropped.
    pub vouched: bool,
    /// Name of its pod.
    pub pod: Option<String>,
    /// Uid of its pod.
    pub uid: Option<String>,
    /// Address of its pod.
    pub ip: Option<IpAddr>,
    /// Port of its pod that is named `http`.
    pub http_port: Option<u16>,
}

/// A record as backends keep it, or what is wrong with it.
pub type Parsed = Result<Arc<Record>, RecordError>;

/// One record and who wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it says.
    pub record: Arc<Record>,
    /// Who wrote it.
    pub author: Arc<Author>,
}

/// All records of a backend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// Those that could be read.
    pub entries: Vec<Entry>,
    /// Those that could not.
    pub problems: Problems,
}

impl Listing {
    /// Adds a record, or the problem with it. Beyond [`RECORDS_MAX`] records
    /// are left out.
    pub fn add(&mut self, key: &Key, parsed: &Parsed, author: &Arc<Author>) {
        match parsed {
            Err(error) => self.problems.add(&key.to_string(), error.reason()),
            Ok(record) if speaks_for_another(record, author) => {
                self.problems.add(&key.to_string(), "foreign_record");
            }
            Ok(_) if self.entries.len() >= RECORDS_MAX => {
                self.problems.add("records", "too_many_records");
            }
            Ok(record) => {
                let (record, author) = (Arc::clone(record), Arc::clone(author));
                self.entries.push(Entry { record, author });
            }
        }
    }
}

/// Whether a record names an instance other than the one that may write it.
/// Channels name only their publisher.
fn speaks_for_another(record: &Record, author: &Author) -> bool {
    let Some(own) = author.instance.filter(|_| author.vouched) else { return false };
    match record {
        Record::Endpoint(endpoint) => endpoint.instance != own,
        Record::Model(model) => model.instance != own,
        Record::Source(source) => source.worker.is_some_and(|(instance, _)| instance != own),
        Record::Channel(_) => false,
    }
}

/// What could not be used, each once, at most [`FLEET_PROBLEMS_MAX`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems {
    kept: BTreeSet<Problem>,
    left_out: u64,
}

impl Problems {
    /// Adds one.
    ///
    /// - `of`: which record or worker; cut after [`PROBLEM_NAME_BYTES_MAX`].
    pub fn add(&mut self, of: &str, reason: &'static str) {
        let end = (0..=PROBLEM_NAME_BYTES_MAX.min(of.len())).rev();
        let of = end.filter_map(|end| of.get(..end)).next().unwrap_or_default().to_owned();
        let problem = Problem { of, reason };
        if self.kept.contains(&problem) {
            return;
        }
        if self.kept.len() >= FLEET_PROBLEMS_MAX {
            self.left_out += 1;
        } else {
            self.kept.insert(problem);
        }
    }

    /// All of them, and how many were left out.
    #[must_use]
    pub fn into_vec(self) -> Vec<Problem> {
        let mut problems: Vec<Problem> = self.kept.into_iter().collect();
        if self.left_out > 0 {
            let of = format!("{} more", self.left_out);
            problems.push(Problem { of, reason: "too_many_problems" });
        }
        problems
    }
}
