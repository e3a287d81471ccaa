//! Answer: what a gateway says itself, in the form that OpenAI's clients read.
//!
//! Who sends it is another matter: the filter has the host do it, the endpoint
//! picker tells the gateway.

use crate::demands::Refusal;
use crate::headers::{DP_RANK, PREFILL_DP_RANK, PREFILL_WORKER, WORKER};
use crate::json::write_string;
use crate::reason::Reason;
use crate::request::RequestError;
use crate::route::{LegKind, Unplaced};

/// After how long a client may try again, in seconds: workers come back, and
/// loads change, about as fast.
const RETRY_AFTER_SECONDS: u32 = 1;

/// One answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    status: u32,
    /// A fixed word, for programs and the access log.
    code: &'static str,
    message: String,
    /// The header or field at fault.
    param: Option<&'static str>,
    may_retry: bool,
}

impl Answer {
    fn new(status: u32, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), param: None, may_retry: false }
    }

    /// The body is no request that an engine could understand.
    #[must_use]
    pub fn bad_request(err: RequestError) -> Self {
        Self { param: err.field(), ..Self::new(400, err.reason(), err.to_string()) }
    }

    /// The request asks for what cannot be.
    #[must_use]
    pub fn refused(refusal: Refusal) -> Self {
        let status = match refusal {
            Refusal::Header(_) | Refusal::Field(_) | Refusal::SessionTooLong(_) => 400,
            Refusal::TooMuchMetadata => 431,
        };
        let param = refusal.name();
        Self { param, ..Self::new(status, refusal.reason(), refusal.to_string()) }
    }

    /// The body is longer than what is looked at, and may not pass unseen.
    #[must_use]
    pub fn body_too_long() -> Self {
        Self::new(413, Reason::BodyTooLarge.word(), "the request body is too long")
    }

    /// The body names a worker of the client's choosing, and the host does not let
    /// it be edited.
    #[must_use]
    pub fn body_kept() -> Self {
        Self::new(500, Reason::Internal.word(), "the request body could not be edited")
    }

    /// The request has no worker.
    ///
    /// - `overload_status`: where all workers are overloaded; Dynamo's is 529.
    #[must_use]
    pub fn unplaced(unplaced: Unplaced, overload_status: u16) -> Self {
        let answer = Self::of_reason(unplaced.reason(), overload_status);
        let (leg, names, what) = match unplaced {
            Unplaced::UnknownPin(LegKind::Serving) => ("worker", WORKER, "is not one that serves"),
            Unplaced::UnknownPin(LegKind::Prefill) => {
                ("prefill worker", PREFILL_WORKER, "is not one that computes prompts for")
            }
            Unplaced::UnknownRank(LegKind::Serving) => ("rank", DP_RANK, "fits no worker of"),
            Unplaced::UnknownRank(LegKind::Prefill) => {
                ("prefill rank", PREFILL_DP_RANK, "fits no worker of")
            }
            _ => return answer,
        };
        let message = format!("the {leg} that `{names}` or `nvext` names {what} this model");
        Self { message, param: Some(names), ..answer }
    }

    fn of_reason(reason: Reason, overload_status: u16) -> Self {
        let (status, may_retry, message) = match reason {
            Reason::PrefillUnavailable => {
                (503, true, "no prefill worker is available for this request")
            }
            Reason::UnknownPin => (400, false, "the request names a worker that is not there"),
            Reason::ConstraintsUnsatisfied => {
                (503, false, "no worker satisfies the routing constraints of this request")
            }
            Reason::NoHosts => {
                (503, true, "the gateway allows none of the workers for this request")
            }
            Reason::Overloaded => {
                (overload_status.into(), true, "every worker for this request is overloaded")
            }
            Reason::QueueFull => (429, true, "every worker for this request is busy"),
            _ => (503, true, "no worker is available for this request"),
        };
        Self { may_retry, ..Self::new(status, reason.word(), message) }
    }

    fn kind(&self) -> &'static str {
        match self.status {
            429 => "rate_limit_error",
            400..500 => "invalid_request_error",
            _ => "server_error",
        }
    }

    /// Its body: JSON.
    #[must_use]
    pub fn body(&self) -> String {
        let Self { code, message, param, .. } = self;
        let param = param.map_or_else(|| "null".to_owned(), quoted);
        format!(
            r#"{{"error":{{"message":{},"type":{},"param":{param},"code":{}}}}}"#,
            quoted(message),
            quoted(self.kind()),
            quoted(code)
        )
    }

    /// Status.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.status
    }

    /// The fixed word, for programs and access logs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        self.code
    }

    /// Its headers but the length.
    #[must_use]
    pub fn headers(&self) -> Vec<(&'static str, String)> {
        let mut headers = vec![("content-type", "application/json".to_owned())];
        if self.may_retry {
            headers.push(("retry-after", RETRY_AFTER_SECONDS.to_string()));
        }
        headers
    }
}

/// A text as a JSON string.
fn quoted(text: &str) -> String {
    let mut json = String::new();
    write_string(text, false, &mut json);
    json
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn texts_are_json() {
        for text in ["", "a \"word\" \\", "line\nend\u{1f}\0", "ünïcode 🙂"] {
            assert_eq!(serde_json::from_str::<String>(&quoted(text)).unwrap(), text);
        }
    }

    #[test]
    fn every_failure_has_its_status() {
        for (reason, status, kind, may_retry) in [
            (Reason::NoWorkers, 503, "server_error", true),
            (Reason::PrefillUnavailable, 503, "server_error", true),
            (Reason::NoHosts, 503, "server_error", true),
            (Reason::ConstraintsUnsatisfied, 503, "server_error", false),
            (Reason::UnknownPin, 400, "invalid_request_error", false),
            (Reason::Overloaded, 529, "server_error", true),
            (Reason::QueueFull, 429, "rate_limit_error", true),
        ] {
            let answer = Answer::of_reason(reason, 529);
            assert_eq!((answer.status, answer.kind(), answer.may_retry), (status, kind, may_retry));
            assert_eq!(answer.code, reason.word());
        }
        assert_eq!(Answer::of_reason(Reason::Overloaded, 503).status, 503);
        assert_eq!(Answer::unplaced(Unplaced::NoWorkers, 529).status, 503);
    }

    #[test]
    fn pins_that_fit_nobody_are_named() {
        use LegKind::{Prefill, Serving};
        for (unplaced, name) in [
            (Unplaced::UnknownPin(Serving), "x-dynamo-worker-instance-id"),
            (Unplaced::UnknownPin(Prefill), "x-dynamo-prefill-instance-id"),
            (Unplaced::UnknownRank(Serving), "x-dynamo-dp-rank"),
            (Unplaced::UnknownRank(Prefill), "x-dynamo-prefill-dp-rank"),
        ] {
            let answer = Answer::unplaced(unplaced, 529);
            assert_eq!((answer.status, answer.param), (400, Some(name)));
            assert!(answer.message.contains(name), "{}", answer.message);
        }
    }

    #[test]
    fn what_is_at_fault_is_named() {
        for (answer, status, param) in [
            (Answer::refused(Refusal::Header("x-a")), 400, Some("x-a")),
            (Answer::refused(Refusal::Field("nvext.dp_rank")), 400, Some("nvext.dp_rank")),
            (Answer::refused(Refusal::SessionTooLong("x-session-id")), 400, Some("x-session-id")),
            (Answer::refused(Refusal::TooMuchMetadata), 431, None),
            (Answer::bad_request(RequestError::NoMessages), 400, Some("messages")),
            (Answer::bad_request(RequestError::Nvext("nvext.a")), 400, Some("nvext.a")),
            (Answer::bad_request(RequestError::InvalidJson(3)), 400, None),
            (Answer::body_too_long(), 413, None),
        ] {
            let body: serde_json::Value = serde_json::from_str(&answer.body()).unwrap();
            let error = &body["error"];
            assert_eq!((answer.status, error["param"].as_str()), (status, param));
            assert_eq!(error["type"], "invalid_request_error");
            assert_eq!(error["code"], answer.code);
            let message = error["message"].as_str().unwrap();
            assert!(param.is_none_or(|param| message.contains(param)), "{message}");
        }
    }
}
