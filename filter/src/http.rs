//! Http: one request's way through the filter.
//!
//! ```text
//! headers → strip → ours? → hold → body complete → decide → hand over → release
//! response: first chunk → prefill done;  end, reset or anything else → free
//! ```
//!
//! # Invariants
//!
//! 1. A client's routing headers are removed before anything else, on every
//!    request.
//! 2. No request waits for anything but its own body.
//! 3. A booking is freed exactly once, whatever ends the stream.

use core::cell::RefCell;
use std::rc::Rc;

use warmpath_core::demands::Demands;
use warmpath_core::handover::{Handover, hand_over};
use warmpath_core::headers::legacy_name;
use warmpath_core::reason::Reason;
use warmpath_core::render::WallClock;
use warmpath_core::request::{Answer as Verdict, Endpoint, Envelope, ParsedRequest, RequestError};
use warmpath_core::route::{Choice, Circumstances, Prepared, Unplaced, prepare};
use warmpath_core::usage::ResponseReader;

use crate::answer::Answer;
use crate::config::{Config, Mode};
use crate::host::{self, Buffer, Headers};
use crate::intake::{Intake, RequestHeaders};
use crate::metrics::Counter;
use crate::pairing;
use crate::place::Placed;
use crate::vm::{self, Vm};

mod response;

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
    config: Rc<Config>,
    phase: Phase,
    intake: Intake,
    response_began: bool,
    placed: Option<Placed>,
    reason: Option<Reason>,
    decision_us: u64,
    exact_prediction: bool,
    response: Option<ResponseReader>,
}

impl Stream {
    /// A request that has just begun.
    #[must_use]
    pub fn new(context: u32, config: Rc<Config>) -> Rc<RefCell<Self>> {
        Rc::new(RefCell::new(Self {
            context,
            config,
            phase: Phase::New,
            intake: Intake::default(),
            response_began: false,
            placed: None,
            reason: None,
            decision_us: 0,
            exact_prediction: false,
            response: None,
        }))
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
            Mode::Body => {
                // The spliced body is longer; without a length it goes chunked.
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
        let Phase::Collecting(endpoint) = self.phase else { return Next::Continue };
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
        if self.config.mode == Mode::Endpoint {
            return self.decide_by_load(Reason::BodyTooLarge, len).unwrap_or(Next::Continue);
        }
        // Its headers have gone, and a body that is not looked at may name a
        // worker of the client's choosing.
        self.pass(Reason::BodyTooLarge);
        Answer::body_too_long().send()
    }

    /// The request ends with trailers: its body is complete, too.
    pub fn on_request_trailers(&mut self) -> Next {
        let Phase::Collecting(endpoint) = self.phase else { return Next::Continue };
        let len = host::buffer(Buffer::RequestBody, 0, usize::MAX).map_or(0, |body| body.len());
        self.decide(endpoint, len)
    }

    fn decide(&mut self, endpoint: Endpoint, len: usize) -> Next {
        let started = host::monotonic_ns();
        self.phase = Phase::Through;
        let body = host::buffer(Buffer::RequestBody, 0, len).unwrap_or_default();
        let next = self.decide_on(endpoint, &body);
        self.decision_us = host::monotonic_ns().saturating_sub(started) / 1_000;
        vm::with(|vm| vm.metrics.decision_took(self.decision_us));
        next
    }

    fn decide_on(&mut self, endpoint: Endpoint, body: &[u8]) -> Next {
        let envelope = Envelope::scan(body);
        let request = envelope.as_ref().map_err(|err| *err).and_then(|e| e.read(endpoint));
        if self.config.mode == Mode::Body && !endpoint.reads_nvext() {
            // Nothing tells a frontend which worker is to serve it.
            let next = self.leave(Reason::NotOurPath);
            self.hand_over(endpoint, envelope.ok().as_ref(), None, body.len());
            return next;
        }
        let nvext = request.as_ref().ok().and_then(|request| request.nvext.as_ref());
        let demands = match self.intake.demands(nvext) {
            Ok(demands) => demands,
            Err(refusal) => return self.refuse(&Answer::refused(refusal)),
        };
        let by_load = |reason| Prepared {
            demands: demands.clone(),
            ..Prepared::by_load(reason, None, body.len())
        };
        let prepared = match &request {
            Ok(request) => {
                let salt = self.intake.trusted_salt.as_deref();
                vm::with(|vm| vm.prepare(request, body.len(), salt, &demands))
            }
            Err(err) if err.answer() == Verdict::BadRequest => {
                return self.refuse(&Answer::bad_request(*err));
            }
            Err(RequestError::TooLarge) => Some(by_load(Reason::BodyTooLarge)),
            Err(_) => Some(by_load(Reason::Unparsed)),
        };
        let Some(prepared) = prepared else {
            vm::with(|vm| vm.metrics.add(Counter::Reentered, 1));
            return self.leave(Reason::Internal);
        };
        let next = self.place(&prepared).unwrap_or(Next::Continue);
        if next == Next::Continue {
            self.count_prediction(&prepared);
            self.hand_over(endpoint, envelope.ok().as_ref(), Some(&prepared), body.len());
        }
        next
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

    fn count_prediction(&mut self, prepared: &Prepared) {
        let Some(placed) = &self.placed else { return };
        if prepared.hashes.is_empty() && prepared.tokens.is_empty() {
            return;
        }
        // A decode worker reports what it was handed, not what was computed.
        self.exact_prediction = prepared.is_exact() && placed.choice.prefill.is_none();
        let predicted = placed.choice.predicted_cached_tokens;
        vm::with(|vm| {
            vm.metrics.add(Counter::PromptTokens, prepared.prompt_tokens.into());
            vm.metrics.add(Counter::PredictedCachedTokens, predicted.into());
        });
    }

    /// Tells the gateway, or the worker's frontend, who was chosen. What the
    /// client's own `nvext` says of workers goes in every case: a frontend
    /// behind the gateway would obey it where our headers are silent.
    fn hand_over(
        &mut self,
        endpoint: Endpoint,
        envelope: Option<&Envelope<'_>>,
        prepared: Option<&Prepared>,
        len: usize,
    ) {
        let names_in_body = self.config.mode == Mode::Body && endpoint.reads_nvext();
        if self.config.mode == Mode::Endpoint {
            self.name_workers_in_headers();
        }
        let Some(envelope) = envelope else { return };
        let choice = self.placed.as_ref().map(|placed| &placed.choice);
        let may_replace = self.config.token_data && choice.is_some();
        let exact = prepared.filter(|prepared| may_replace && prepared.is_exact());
        let tokens = exact.map(|prepared| prepared.tokens.as_slice());
        let named = choice.filter(|_| names_in_body).map(Choice::handover);
        if named.is_none() && tokens.is_none() && envelope.splice.nvext.is_empty() {
            return;
        }
        let handover = Handover { token_data: tokens, ..named.unwrap_or_default() };
        let Ok(body) = hand_over(&envelope.splice, &handover) else {
            vm::with(|vm| vm.metrics.add(Counter::NvextNotObject, 1));
            return;
        };
        if host::replace_buffer(Buffer::RequestBody, len, &body).is_err() {
            vm::with(|vm| vm.metrics.add(Counter::HostRefused, 1));
            return;
        }
        // A length that does not fit the new body would leave the worker
        // waiting for the rest. In mode `body` it is removed already.
        if self.config.mode == Mode::Endpoint && self.intake.length.is_some() {
            let length = body.len().to_string();
            if host::set_header(Headers::Request, "content-length", &length).is_err() {
                vm::with(|vm| vm.metrics.add(Counter::HostRefused, 1));
            }
        }
    }

    fn name_workers_in_headers(&self) {
        let Some(placed) = &self.placed else { return };
        for (name, value) in placed.choice.headers(self.config.prefiller_header) {
            let legacy = legacy_name(name).filter(|_| self.config.legacy_headers);
            for name in [name].into_iter().chain(legacy) {
                if host::set_header(Headers::Request, name, &value).is_err() {
                    vm::with(|vm| vm.metrics.add(Counter::HostRefused, 1));
                }
            }
        }
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
            Attempt::Placed => self.name_workers_in_headers(),
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
            self.name_workers_in_headers();
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

impl Vm {
    fn prepare(
        &mut self,
        request: &ParsedRequest<'_>,
        body_bytes: usize,
        trusted_salt: Option<&str>,
        demands: &Demands,
    ) -> Prepared {
        let seconds = host::wall_clock_ns() / 1_000_000_000;
        let now = WallClock {
            unix_seconds: i64::try_from(seconds).unwrap_or(i64::MAX),
            utc_offset_seconds: 0,
        };
        let salt_from_body = self.config.cache_salt_from_body;
        let circumstances =
            Circumstances { body_bytes, now, trusted_salt, salt_from_body, demands };
        let Self { models, replica, random, .. } = self;
        prepare(models, replica.roster(), request, &circumstances, random)
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
