//! Http: one request's way through the filter.
//!
//! ```text
//! headers → strip → ours? → hold → body complete → decide → hand over → release
//!                                   long prompt ↺ a slice at a time
//! response: first part of a stream → prefill done;  end, reset or anything else → free
//! ```
//!
//! # Invariants
//!
//! 1. A client's routing headers are removed before anything else, on every
//!    request.
//! 2. No request waits for anything but its own body, and a long one for its
//!    turns to be read.
//! 3. A booking is freed exactly once, whatever ends the stream.

use core::cell::RefCell;
use std::rc::{Rc, Weak};

use warmpath_core::headers::{legacy_name, property_name};
use warmpath_core::reason::Reason;
use warmpath_core::request::Endpoint;
use warmpath_core::route::{Prepared, Unplaced};
use warmpath_core::usage::ResponseReader;

use crate::answer::Answer;
use crate::config::{Config, Mode};
use crate::host::{self, Buffer, Headers};
use crate::intake::{Intake, RequestHeaders};
use crate::metrics::Counter;
use crate::pairing;
use crate::place::Placed;
use crate::vm::{self, Vm};

mod decide;
mod response;

pub(crate) use decide::{Part, Turn};

/// What a callback tells the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Let the data go on.
    Continue,
    /// Hold it back.
    Pause,
}

/// How far a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing has come yet.
    New,
    /// Not ours, or already released.
    Through,
    /// Held until its body is complete.
    Collecting(Endpoint),
    /// Held until its prompt is read.
    Waiting,
}

/// What became of an attempt to place a request.
enum Attempt {
    /// It has its workers.
    Placed,
    /// It has none.
    Unplaced(Unplaced),
    /// The gateway's own balancing is to decide.
    Left(Reason),
}

/// One request.
#[derive(Debug)]
pub struct Stream {
    context: u32,
    this: Weak<RefCell<Self>>,
    config: Rc<Config>,
    phase: Phase,
    intake: Intake,
    /// Whether the answer may come in parts, so that its first one tells something.
    streams: bool,
    response_began: bool,
    placed: Option<Placed>,
    reason: Option<Reason>,
    /// Time spent on the decision so far.
    spent_ns: u64,
    decision_us: u64,
    exact_prediction: bool,
    response: Option<ResponseReader>,
}

impl Stream {
    /// A request that has just begun.
    #[must_use]
    pub fn new(context: u32, config: Rc<Config>) -> Rc<RefCell<Self>> {
        Rc::new_cyclic(|this| {
            RefCell::new(Self {
                context,
                this: this.clone(),
                config,
                phase: Phase::New,
                intake: Intake::default(),
                streams: true,
                response_began: false,
                placed: None,
                reason: None,
                spent_ns: 0,
                decision_us: 0,
                exact_prediction: false,
                response: None,
            })
        })
    }

    /// The request's headers are here.
    pub fn on_request_headers(this: &Rc<RefCell<Self>>, is_end: bool) -> Next {
        let Ok(mut stream) = this.try_borrow_mut() else { return Next::Continue };
        let headers = RequestHeaders::take(&stream.config);
        let Some(endpoint) = headers.endpoint() else {
            return stream.leave(Reason::NotOurPath);
        };
        match headers.read(&stream.config) {
            Ok(intake) => stream.intake = intake,
            Err(refusal) => return stream.refuse(&Answer::refused(refusal)),
        }
        let length = stream.intake.length;
        // The headers are still at hand, so even mode `body` may name the worker
        // in them where no body is looked at.
        if !headers.posts() {
            return stream.ask_anyone();
        }
        if is_end || length.is_some_and(|length| length > stream.config.body_bytes_max) {
            let reason = if is_end { Reason::Unparsed } else { Reason::BodyTooLarge };
            let next = stream.decide_by_load(reason, length.unwrap_or(0));
            return next.unwrap_or(Next::Continue);
        }
        stream.phase = Phase::Collecting(endpoint);
        match stream.config.mode {
            Mode::Endpoint if pairing::may_hold(stream.context, this) => Next::Pause,
            Mode::Endpoint => {
                let next = stream.decide_by_load(Reason::WrongPairing, length.unwrap_or(0));
                next.unwrap_or(Next::Continue)
            }
            Mode::Body | Mode::Buffer => {
                // The spliced body is longer; without a length it goes chunked, or
                // the `buffer` filter sets the new one.
                let _ = host::remove_header(Headers::Request, "content-length");
                Next::Continue
            }
        }
    }

    /// The gateway does not bring the body of this request, which is held:
    /// routes it without. Returns what becomes of it, if it was held at all: with
    /// no worker for it, it is answered here and must not go on.
    pub(crate) fn give_up_body(&mut self) -> Option<Next> {
        matches!(self.phase, Phase::Collecting(_))
            .then(|| self.decide_by_load(Reason::WrongPairing, 0).unwrap_or(Next::Continue))
    }

    /// A part of the request's body is here; `len` bytes are buffered.
    pub fn on_request_body(&mut self, len: usize, is_end: bool) -> Next {
        let Phase::Collecting(endpoint) = self.phase else { return self.held_or_through() };
        if self.config.mode == Mode::Endpoint {
            vm::with(|vm| vm.pairing.prove());
        }
        if len > self.config.body_bytes_max {
            return self.give_up_long_body(len);
        }
        if !is_end {
            return Next::Pause;
        }
        self.decide(endpoint, len)
    }

    /// The body is longer than what is looked at, and had announced no length.
    fn give_up_long_body(&mut self, len: usize) -> Next {
        if self.config.mode != Mode::Body {
            return self.decide_by_load(Reason::BodyTooLarge, len).unwrap_or(Next::Continue);
        }
        // Its headers have gone, and a body that is not looked at may name a
        // worker of the client's choosing.
        self.pass(Reason::BodyTooLarge);
        Answer::body_too_long().send()
    }

    /// The request ends with trailers: its body is complete, too.
    pub fn on_request_trailers(&mut self) -> Next {
        let Phase::Collecting(endpoint) = self.phase else { return self.held_or_through() };
        let len = host::buffer(Buffer::RequestBody, 0, usize::MAX).map_or(0, |body| body.len());
        self.decide(endpoint, len)
    }

    fn held_or_through(&self) -> Next {
        if self.phase == Phase::Waiting { Next::Pause } else { Next::Continue }
    }

    /// Chooses and books. Returns what to tell the host if there is no worker.
    fn place(&mut self, prepared: &Prepared) -> Option<Next> {
        match self.attempt(prepared) {
            Attempt::Placed => None,
            Attempt::Left(reason) => Some(self.leave(reason)),
            Attempt::Unplaced(unplaced) => {
                self.pass(unplaced.reason());
                let status = vm::with(|vm| vm.overload_status()).unwrap_or(503);
                Some(Answer::unplaced(unplaced, status).send())
            }
        }
    }

    fn attempt(&mut self, prepared: &Prepared) -> Attempt {
        let placed = vm::with(|vm| {
            let knows_workers = vm.knows_workers();
            vm.place(prepared).map_err(|unplaced| knows_workers.then_some(unplaced))
        });
        match placed {
            Some(Ok(placed)) => {
                self.set_reason(placed.choice.reason);
                self.placed = Some(placed);
                Attempt::Placed
            }
            Some(Err(Some(unplaced))) => Attempt::Unplaced(unplaced),
            // No roster has come yet: the gateway's own balancing knows more.
            Some(Err(None)) => Attempt::Left(Reason::Warming),
            None => Attempt::Left(Reason::Internal),
        }
    }

    /// Names the workers in headers, or in the properties that stand for them.
    fn name_workers(&self) {
        let Some(placed) = &self.placed else { return };
        let mut refused = 0;
        for (name, value) in placed.choice.headers(self.config.prefiller_header) {
            if self.config.mode == Mode::Buffer {
                let name = property_name(name).unwrap_or(name);
                refused += u64::from(host::set_property(name, value.as_bytes()).is_err());
                continue;
            }
            let legacy = legacy_name(name).filter(|_| self.config.legacy_headers);
            for name in [name].into_iter().chain(legacy) {
                let set = host::set_header(Headers::Request, name, &value);
                refused += u64::from(set.is_err());
            }
        }
        vm::with(|vm| vm.metrics.add(Counter::HostRefused, refused));
    }

    /// Routes a request that asks for no work, and that any worker can answer:
    /// whom the gateway takes will do, too.
    fn ask_anyone(&mut self) -> Next {
        self.phase = Phase::Through;
        let demands = match self.intake.demands(None) {
            Ok(demands) => demands,
            Err(refusal) => return self.refuse(&Answer::refused(refusal)),
        };
        let prepared = Prepared { demands, ..Prepared::by_load(Reason::ByLoadApi, None, 0) };
        match self.attempt(&prepared) {
            Attempt::Placed => self.name_workers(),
            Attempt::Unplaced(unplaced) => self.set_reason(unplaced.reason()),
            Attempt::Left(reason) => self.set_reason(reason),
        }
        Next::Continue
    }

    /// Routes by load, without looking at the body, while the headers can still
    /// name the worker. Returns what to tell the host if there is no worker.
    fn decide_by_load(&mut self, reason: Reason, len: usize) -> Option<Next> {
        self.phase = Phase::Through;
        let demands = match self.intake.demands(None) {
            Ok(demands) => demands,
            Err(refusal) => return Some(self.refuse(&Answer::refused(refusal))),
        };
        let prepared = Prepared { demands, ..Prepared::by_load(reason, None, len) };
        let next = self.place(&prepared);
        if next.is_none() {
            self.name_workers();
        }
        next
    }

    fn set_reason(&mut self, reason: Reason) {
        if self.reason.is_none() {
            self.reason = Some(reason);
            vm::with(|vm| vm.metrics.decided(reason));
            let _ = host::set_property("warmpath_reason", reason.word().as_bytes());
        }
    }

    fn pass(&mut self, reason: Reason) {
        self.phase = Phase::Through;
        self.set_reason(reason);
    }

    fn leave(&mut self, reason: Reason) -> Next {
        self.pass(reason);
        Next::Continue
    }

    fn refuse(&mut self, answer: &Answer) -> Next {
        self.pass(Reason::BadRequest);
        answer.send()
    }

    /// The stream has ended, however. Called at its log and at its drop.
    pub fn end(&mut self) {
        if self.phase == Phase::Waiting {
            self.phase = Phase::Through;
            vm::with(|vm| vm.forget_waiting(self.context));
        }
        if let Some(placed) = &self.placed {
            vm::with(|vm| vm.request_ended(placed));
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.end();
    }
}

/// What the settings say.
impl Vm {
    /// Whether sessions are bound to workers.
    pub(crate) fn binds_sessions(&self) -> bool {
        self.settings(None).session_affinity.is_some()
    }

    /// Status of answers when every worker is overloaded.
    pub(crate) fn overload_status(&self) -> u16 {
        self.settings(None).overload_status
    }
}
