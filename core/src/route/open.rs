//! Open: from a complete body to a prompt that is being read, or to the answer
//! that ends it.

use super::{Circumstances, Prepared, Reading};
use crate::choose::Random;
use crate::demands::Refusal;
use crate::intake::Intake;
use crate::models::Models;
use crate::reason::Reason;
use crate::render::WallClock;
use crate::request::{Answer, Endpoint, Envelope, RequestError, Splice};
use crate::roster::Roster;

/// What is known besides headers and body.
#[derive(Clone, Copy, Debug)]
pub struct Conditions {
    /// Whether the body's own cache salt counts where no trusted hop gave one.
    pub salt_from_body: bool,
    /// For templates that print the date.
    pub now: WallClock,
}

/// A request that goes on.
#[derive(Debug)]
pub enum Opened {
    /// Its prompt is being read.
    Reading(Box<Reading>),
    /// There is nothing to read: it is routed by load.
    Read(Box<Prepared>),
}

/// Why a request is answered at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// The body is no request that an engine could understand.
    BadRequest(RequestError),
    /// It asks for what cannot be.
    Refused(Refusal),
}

/// A body, looked at.
#[derive(Debug)]
pub struct Opening<'a> {
    /// What becomes of the request.
    pub request: Result<Opened, Closed>,
    /// Where `nvext` is, or would go, if the body could be scanned.
    pub splice: Option<Splice<'a>>,
    /// Whether the answer may be streamed: a body that cannot be read may say so.
    pub streams: bool,
}

/// Parses a body and renders its prompt.
///
/// - `roster`, `random`: as for [`Reading::begin`].
pub fn open<'a>(
    models: &mut Models,
    roster: &Roster,
    (endpoint, body): (Endpoint, &'a [u8]),
    intake: &Intake,
    conditions: Conditions,
    random: &mut Random,
) -> Opening<'a> {
    let envelope = Envelope::scan(body);
    let parsed = envelope.as_ref().map_err(|err| *err).and_then(|it| it.read(endpoint));
    let nvext = parsed.as_ref().ok().and_then(|request| request.nvext.as_ref());
    let request = match intake.demands(nvext) {
        Err(refusal) => Err(Closed::Refused(refusal)),
        Ok(demands) => match &parsed {
            Ok(request) => {
                let circumstances = Circumstances {
                    body_bytes: body.len(),
                    now: conditions.now,
                    trusted_salt: intake.trusted_salt.as_deref(),
                    salt_from_body: conditions.salt_from_body,
                    demands: &demands,
                };
                let reading = Reading::begin(models, roster, request, &circumstances, random);
                Ok(Opened::Reading(Box::new(reading)))
            }
            Err(err) if err.answer() == Answer::BadRequest => Err(Closed::BadRequest(*err)),
            Err(err) => {
                let is_long = *err == RequestError::TooLarge;
                let reason = if is_long { Reason::BodyTooLarge } else { Reason::Unparsed };
                let prepared = Prepared::by_load(reason, None, body.len());
                Ok(Opened::Read(Box::new(Prepared { demands, ..prepared })))
            }
        },
    };
    let streams = match &parsed {
        Ok(parsed) => parsed.stream,
        Err(_) => request.is_ok(),
    };
    Opening { request, streams, splice: envelope.ok().map(|envelope| envelope.splice) }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn look(body: &[u8]) -> Opening<'_> {
        let now = WallClock { unix_seconds: 0, utc_offset_seconds: 0 };
        open(
            &mut Models::default(),
            &Roster::default(),
            (Endpoint::ChatCompletions, body),
            &Intake::default(),
            Conditions { salt_from_body: true, now },
            &mut Random::seeded(1),
        )
    }

    #[test]
    fn a_chat_is_read_and_has_a_place_for_nvext() {
        let body =
            br#"{"messages":[{"role":"user","content":"a"}],"nvext":{"dp_rank":1},"stream":true}"#;
        let opening = look(body);
        assert!(opening.streams && !look(b"{}").streams);
        assert!(matches!(opening.request, Ok(Opened::Reading(_))));
        assert_eq!(opening.splice.map(|splice| splice.nvext.len()), Some(1));
    }

    #[test]
    fn what_no_engine_understands_is_answered() {
        let opening = look(b"{");
        assert!(matches!(opening.request, Err(Closed::BadRequest(_))) && opening.splice.is_none());
        let opening = look(br#"{"nvext":{"routing_constraints":1},"messages":[]}"#);
        assert!(matches!(opening.request, Err(Closed::BadRequest(_))) && opening.splice.is_some());
    }

    #[test]
    fn what_an_engine_may_understand_goes_by_load() {
        for (body, expected) in
            [(&b"[1]"[..], Reason::Unparsed), (br#"{"messages":[]}"#, Reason::Unparsed)]
        {
            match look(body).request {
                Ok(Opened::Read(prepared)) => {
                    assert!(look(body).streams, "it may be");
                    assert_eq!(prepared.reason, expected);
                    assert_eq!(prepared.prompt_tokens as usize, body.len() / 4);
                }
                other => panic!("{other:?}"),
            }
        }
    }
}
