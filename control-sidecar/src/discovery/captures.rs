//! Captures of Dynamo 1.6.1's discovery, for tests.

use std::sync::Arc;

use serde_json::Value;

use super::listing::{Author, Listing};
use super::record::{Bucket, Key, Record, parse_value};
use crate::config::discovery::IdBits;

/// Records with their keys.
pub(crate) type Captured = Vec<(Key, Value)>;

/// Two ranks of an aggregated worker, in the file store.
pub(crate) fn file() -> Captured {
    let text = include_str!("../../tests/fixtures/dynamo-1.6.1-discovery-file-agg-dp2.json");
    let capture: Value = serde_json::from_str(text).unwrap();
    let files = capture["files"].as_object().unwrap();
    let read = |(path, value): (&String, &Value)| {
        let (directory, name) = path.rsplit_once('/').unwrap();
        let bucket = Bucket::ALL.into_iter().find(|bucket| bucket.path() == directory).unwrap();
        (Key::of_file(bucket, name).unwrap(), value.clone())
    };
    files.iter().map(read).collect()
}

/// A prefill and a decode worker, in etcd.
pub(crate) fn etcd() -> Captured {
    let text = include_str!("../../tests/fixtures/dynamo-1.6.1-discovery-etcd-prefill-decode.json");
    let capture: Value = serde_json::from_str(text).unwrap();
    let read = |pair: &Value| {
        (Key::of_etcd(pair["key"].as_str().unwrap()).unwrap(), pair["value"].clone())
    };
    capture["kvs"].as_array().unwrap().iter().map(read).collect()
}

/// The custom resource of a prefill worker.
pub(crate) fn resource_body() -> Value {
    let text = include_str!("../../tests/fixtures/dynamo-1.6.1-discovery-k8s-cr.json");
    let capture: Value = serde_json::from_str(text).unwrap();
    capture["body"].clone()
}

/// A prefill worker, in a custom resource.
pub(crate) fn resource() -> Captured {
    let body = resource_body();
    let mut all = Vec::new();
    for bucket in Bucket::ALL {
        let section = body["spec"]["data"][bucket.section()].as_object().unwrap();
        all.extend(section.iter().map(|(key, it)| (Key::of_resource(bucket, key), it.clone())));
    }
    all
}

/// The records of a capture.
pub(crate) fn parsed(captured: Captured) -> Vec<Record> {
    captured.iter().map(|(key, value)| parse_value(key, value).unwrap()).collect()
}

/// A capture as a backend hands it on.
pub(crate) fn listing(captured: &Captured, author: Author) -> Listing {
    let author = Arc::new(author);
    let mut listing = Listing::default();
    for (key, value) in captured {
        listing.add(key, &parse_value(key, value).map(Arc::new), &author);
    }
    listing
}

/// Who wrote the custom resource.
pub(crate) fn resource_author() -> Author {
    Author {
        instance: Some(IdBits::Masked.id_of("tiny-prefill-0").0),
        vouched: true,
        pod: Some("tiny-prefill-0".to_owned()),
        uid: Some("11111111-2222-3333-4444-555555555555".to_owned()),
        ip: Some([10, 1, 2, 3].into()),
        http_port: Some(8123),
    }
}
