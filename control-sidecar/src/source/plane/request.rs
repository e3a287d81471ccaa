//! Request: a query for a rank's history, as Dynamo's TCP request plane wants it.
//!
//! Pure. The JSON is written as Python writes it, so that it can be compared
//! byte for byte with what a captured client sent.

use rmp::encode::{write_bool, write_map_len, write_nil, write_str, write_uint};
use warmpath_core::ids::Worker;

/// One query.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// Path of the worker's endpoint.
    pub path: &'a str,
    /// Names the request.
    pub id: &'a str,
    /// Names the connection on which the worker calls back.
    pub subject: &'a str,
    /// `host:port` where it calls back.
    pub address: &'a str,
    /// The rank whose history is wanted.
    pub worker: Worker,
    /// First event wanted; `None` for all that the rank holds.
    pub start: Option<u64>,
}

impl Request<'_> {
    /// The bytes to send: path, headers and payload, each behind its length.
    /// `None` if one of them is too long for its length field.
    #[must_use]
    pub fn encode(&self) -> Option<Vec<u8>> {
        let (id, path) = (quoted(self.id), quoted(self.path));
        let headers = format!("{{\"request-id\": {id}, \"x-endpoint-path\": {path}}}");
        let payload = self.payload();
        let mut bytes = Vec::with_capacity(payload.len() + headers.len() + self.path.len() + 8);
        for part in [self.path, &headers] {
            bytes.extend_from_slice(&u16::try_from(part.len()).ok()?.to_be_bytes());
            bytes.extend_from_slice(part.as_bytes());
        }
        bytes.extend_from_slice(&u32::try_from(payload.len()).ok()?.to_be_bytes());
        bytes.extend_from_slice(&payload);
        Some(bytes)
    }

    /// A frame of two parts: what is wanted of the request plane, and of the
    /// endpoint.
    fn payload(&self) -> Vec<u8> {
        let (header, body) = (self.header(), self.body());
        let mut bytes = Vec::with_capacity(24 + header.len() + body.len());
        bytes.extend_from_slice(&(header.len() as u64).to_be_bytes());
        bytes.extend_from_slice(&(body.len() as u64).to_be_bytes());
        // No checksum.
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(&body);
        bytes
    }

    fn header(&self) -> String {
        let (id, address, subject) = (quoted(self.id), quoted(self.address), quoted(self.subject));
        let info = quoted(&format!(
            "{{\"address\": {address}, \"subject\": {subject}, \"context\": {id}, \
             \"stream_type\": \"response\"}}"
        ));
        format!(
            "{{\"id\": {id}, \"request_type\": \"single_in\", \"response_type\": \"many_out\", \
             \"payload_codec\": \"msgpack\", \"connection_info\": \
             {{\"transport\": \"tcp_server\", \"info\": {info}}}}}"
        )
    }

    fn body(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        // Writing to memory cannot fail.
        let _ = self.write_body(&mut bytes);
        bytes
    }

    fn write_body(&self, bytes: &mut Vec<u8>) -> std::io::Result<()> {
        write_map_len(bytes, 6)?;
        write_str(bytes, "worker_id")?;
        write_uint(bytes, self.worker.id.0)?;
        write_str(bytes, "dp_rank")?;
        write_uint(bytes, u64::from(self.worker.rank.0))?;
        write_str(bytes, "start_event_id")?;
        match self.start {
            Some(start) => {
                write_uint(bytes, start)?;
            }
            None => write_nil(bytes)?,
        }
        write_str(bytes, "end_event_id")?;
        write_nil(bytes)?;
        write_str(bytes, "supports_tree_dump_failed")?;
        write_bool(bytes, true)?;
        write_str(bytes, "kind")?;
        write_str(bytes, "recovery")?;
        Ok(())
    }
}

/// A text as JSON has it.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::tests::{fixture, hex};
    use warmpath_core::ids::{DpRank, WorkerId};

    /// Goal: the bytes are those that a captured client sent, to which the real
    /// worker answered.
    #[test]
    fn requests_are_the_captured_bytes() {
        let capture = fixture("dynamo-1.6.1-kv-recovery-tcp.json");
        let worker = Worker { id: WorkerId(5_828_232_121_315_182_395), rank: DpRank(0) };
        let given = [
            ("83e6d3f8-2b5e-47d4-a5f1-1a50595b4229", "0c1bb1eb-26c5-4d3f-b05e-64fbdd77298a", 47337),
            ("18dde7c5-9055-4ec4-9bec-f1bca438de65", "45396355-8b0b-4580-8d98-38269440ef18", 34453),
            ("7d825081-4b77-46b6-8c8d-1dc8ff2e93ca", "db238040-2a3c-489f-864a-42207a267f1c", 37005),
        ];
        for (query, (id, subject, port)) in given.iter().enumerate() {
            let captured = &capture["queries"][query];
            let request = Request {
                path: "50e20a3c2b83473b/dynamo/backend/worker_kv_query_source_774b1c642b00b",
                id,
                subject,
                address: &format!("127.0.0.1:{port}"),
                worker,
                start: captured["start_event_id"].as_u64(),
            };
            let expected = hex(captured["request"].as_str().unwrap());
            assert_eq!(request.encode().unwrap(), expected);
        }
    }

    #[test]
    fn a_path_too_long_for_its_length_is_refused() {
        let path = "x".repeat(70_000);
        let worker = Worker { id: WorkerId(1), rank: DpRank(0) };
        let request =
            Request { path: &path, id: "", subject: "", address: "", worker, start: None };
        assert_eq!(request.encode(), None);
    }
}
