//! Answer: what the gateway says itself, sent through the host.

use warmpath_core::demands::Refusal;
use warmpath_core::request::RequestError;
use warmpath_core::route::Unplaced;

use crate::host;
use crate::http::Next;
use crate::metrics::Counter;
use crate::vm;

/// A local reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer(warmpath_core::answer::Answer);

impl Answer {
    /// The body is no request that an engine could understand.
    pub(crate) fn bad_request(err: RequestError) -> Self {
        Self(warmpath_core::answer::Answer::bad_request(err))
    }

    /// The request asks for what cannot be.
    pub(crate) fn refused(refusal: Refusal) -> Self {
        Self(warmpath_core::answer::Answer::refused(refusal))
    }

    /// The body is longer than what is looked at, and may not pass unseen.
    pub(crate) fn body_too_long() -> Self {
        Self(warmpath_core::answer::Answer::body_too_long())
    }

    /// The body names a worker of the client's choosing, and the host does not let
    /// it be edited.
    pub(crate) fn body_kept() -> Self {
        Self(warmpath_core::answer::Answer::body_kept())
    }

    /// The request has no worker.
    ///
    /// - `overload_status`: where all workers are overloaded; Dynamo's is 529.
    pub(crate) fn unplaced(unplaced: Unplaced, overload_status: u16) -> Self {
        Self(warmpath_core::answer::Answer::unplaced(unplaced, overload_status))
    }

    /// Sends it in place of the request. If the host refuses, the request goes on.
    pub(crate) fn send(&self) -> Next {
        let Self(answer) = self;
        let headers = answer.headers();
        let headers: Vec<(&str, &str)> =
            headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let body = answer.body();
        if host::respond(answer.status(), answer.code(), &headers, body.as_bytes()).is_err() {
            vm::with(|vm| vm.metrics.add(Counter::HostRefused, 1));
            return Next::Continue;
        }
        Next::Pause
    }
}
