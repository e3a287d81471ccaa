//! Decide: from a complete body to its worker, and a body that names it.
//!
//! An ordinary request is done in the callback that brings its body's end. One
//! whose prompt takes longer is held, and the rest done in turns of their own;
//! see [`reading`](crate::reading).

use warmpath_core::handover::{Handover, TokenText, hand_over};
use warmpath_core::reason::Reason;
use warmpath_core::render::WallClock;
use warmpath_core::request::{Endpoint, Envelope, NvextSpan, Splice};
use warmpath_core::route::{Choice, Closed, Conditions, Opened, Opening, Prepared, Reading, open};

use super::{Next, Phase, Stream};
use crate::answer::Answer;
use crate::config::Mode;
use crate::host::{self, Buffer, Headers};
use crate::intake::Intake;
use crate::limits::{
    INLINE_BODY_BYTES_MAX, INLINE_SLICE_NS, SLICE_NS, SLICE_STEP_BYTES, SLICE_STEP_TOKENS,
};
use crate::metrics::{Counter, Histogram};
use crate::reading::Waiting;
use crate::vm::{self, Vm};

/// What is still to be done of a decision.
#[derive(Debug)]
pub(crate) enum Part {
    /// All of it.
    Unread { endpoint: Endpoint, len: usize },
    /// The body is parsed.
    Begun(Box<Begun>),
}

impl Part {
    /// About how many bytes of text are still to be read.
    pub(crate) fn bytes_left(&self) -> usize {
        match self {
            Self::Unread { len, .. } => *len,
            Self::Begun(begun) => match &begun.prompt {
                Prompt::Reading(reading) => reading.bytes_left(),
                Prompt::Read(_) => 0,
            },
        }
    }
}

/// A request whose body is parsed. Nothing of it is borrowed.
#[derive(Debug)]
pub(crate) struct Begun {
    endpoint: Endpoint,
    /// Length of the body, in bytes.
    len: usize,
    /// The body, while it is at hand.
    body: Option<Vec<u8>>,
    seams: Option<Seams>,
    prompt: Prompt,
    /// The prompt's tokens as they are handed over, if they are.
    tokens: TokenText,
}

#[derive(Debug)]
enum Prompt {
    Reading(Box<Reading>),
    Read(Box<Prepared>),
}

/// Where `nvext` is, or would go, in a body that is not at hand.
#[derive(Debug)]
struct Seams {
    nvext: Vec<NvextSpan>,
    root_close: usize,
    root_empty: bool,
}

impl Seams {
    fn of(splice: Splice<'_>) -> Self {
        let Splice { nvext, root_close, root_empty, .. } = splice;
        Self { nvext, root_close, root_empty }
    }

    fn splice<'a>(&self, body: &'a str) -> Splice<'a> {
        let Self { nvext, root_close, root_empty } = self;
        let (root_close, root_empty) = (*root_close, *root_empty);
        Splice { body, nvext: nvext.clone(), root_close, root_empty }
    }
}

/// How a turn ended.
#[derive(Debug)]
pub(crate) enum Turn {
    /// The request is decided or answered.
    Done(Next),
    /// The time is over.
    More(Part),
}

/// How long a turn may take, and how it ends.
#[derive(Clone, Copy, Debug)]
struct Limits {
    started_ns: u64,
    slice_ns: u64,
    /// Why the prompt is not to be read to its end.
    give_up: Option<Reason>,
}

impl Limits {
    fn elapsed_ns(&self) -> u64 {
        host::monotonic_ns().saturating_sub(self.started_ns)
    }
}

impl Stream {
    /// The body is complete.
    pub(super) fn decide(&mut self, endpoint: Endpoint, len: usize) -> Next {
        let started_ns = host::monotonic_ns();
        self.phase = Phase::Through;
        let part = Part::Unread { endpoint, len };
        let is_long = len > INLINE_BODY_BYTES_MAX;
        let turn = if is_long {
            Turn::More(part)
        } else {
            self.turn(part, Limits { started_ns, slice_ns: INLINE_SLICE_NS, give_up: None })
        };
        let part = match turn {
            Turn::Done(next) => return next,
            Turn::More(part) => part,
        };
        match self.wait(part, len, started_ns) {
            Ok(()) => Next::Pause,
            Err(part) => match self.take_turn(part, Some(Reason::ReadCrowded)) {
                Turn::Done(next) => next,
                Turn::More(_) => self.leave(Reason::Internal),
            },
        }
    }

    fn wait(&mut self, mut part: Part, len: usize, since_ns: u64) -> Result<(), Part> {
        if let Part::Begun(begun) = &mut part {
            // The host holds it, too.
            begun.body = None;
        }
        let (context, stream) = (self.context, self.this.clone());
        let waiting = Waiting { context, stream, since_ns, len, part };
        let mut waiting = Some(waiting);
        let refused = vm::with(|vm| waiting.take().and_then(|it| vm.let_wait(it).err())).flatten();
        match refused.or(waiting) {
            None => {
                self.phase = Phase::Waiting;
                Ok(())
            }
            Some(waiting) => Err(waiting.part),
        }
    }

    /// Goes on with a decision for a slice.
    ///
    /// - `give_up`: why the prompt is not to be read to its end; the turn is then
    ///   the last.
    pub(crate) fn take_turn(&mut self, part: Part, give_up: Option<Reason>) -> Turn {
        let started_ns = host::monotonic_ns();
        self.turn(part, Limits { started_ns, slice_ns: SLICE_NS, give_up })
    }

    fn turn(&mut self, part: Part, limits: Limits) -> Turn {
        let turn = self.advance(part, limits);
        self.spent_ns += limits.elapsed_ns();
        self.decision_us = self.spent_ns / 1_000;
        if let Turn::Done(_) = turn {
            self.phase = Phase::Through;
            vm::with(|vm| vm.metrics.took(Histogram::Decision, self.spent_ns));
        }
        turn
    }

    fn advance(&mut self, part: Part, limits: Limits) -> Turn {
        let mut begun = match part {
            Part::Unread { endpoint, len } => match self.begin(endpoint, len) {
                Ok(begun) => Box::new(begun),
                Err(next) => return Turn::Done(next),
            },
            Part::Begun(begun) => begun,
        };
        while let Prompt::Reading(reading) = &mut begun.prompt {
            let read = match limits.give_up {
                Some(reason) => vm::with(|vm| Some(reading.give_up(&vm.models, reason))),
                None if limits.elapsed_ns() >= limits.slice_ns => {
                    return Turn::More(Part::Begun(begun));
                }
                None => vm::with(|vm| reading.step(&mut vm.models, SLICE_STEP_BYTES)),
            };
            match read {
                Some(Some(prepared)) => begun.prompt = Prompt::Read(Box::new(prepared)),
                Some(None) => {}
                None => {
                    vm::with(|vm| vm.metrics.add(Counter::Reentered, 1));
                    return Turn::Done(self.leave(Reason::Internal));
                }
            }
        }
        if let Prompt::Read(prepared) = &begun.prompt
            && self.config.token_data
            && prepared.is_exact()
        {
            while !begun.tokens.write(&prepared.tokens, SLICE_STEP_TOKENS) {
                if limits.give_up.is_none() && limits.elapsed_ns() >= limits.slice_ns {
                    return Turn::More(Part::Begun(begun));
                }
            }
        }
        // Booking a long prompt and writing its body anew take a while, too.
        let is_long = begun.len > INLINE_BODY_BYTES_MAX && limits.give_up.is_none();
        if is_long && limits.elapsed_ns() >= limits.slice_ns / 4 {
            return Turn::More(Part::Begun(begun));
        }
        Turn::Done(self.finish(*begun))
    }

    /// Parses the body and renders the prompt. What is to be told to the host is
    /// the error, if that ends it.
    fn begin(&mut self, endpoint: Endpoint, len: usize) -> Result<Begun, Next> {
        let body = host::buffer(Buffer::RequestBody, 0, len).unwrap_or_default();
        if self.config.mode == Mode::Body && !endpoint.reads_nvext() {
            // Nothing tells a frontend which worker is to serve it.
            let next = self.leave(Reason::NotOurPath);
            let seams = Envelope::scan(&body).ok().map(|envelope| Seams::of(envelope.splice));
            return Err(
                match self.hand_over(
                    endpoint,
                    seams.as_ref(),
                    &TokenText::default(),
                    len,
                    Some(body),
                ) {
                    Ok(()) => next,
                    Err(answered) => answered,
                },
            );
        }
        let opening = vm::with(|vm| vm.open_body((endpoint, &body), &self.intake));
        let Some(Opening { request, splice, streams }) = opening else {
            vm::with(|vm| vm.metrics.add(Counter::Reentered, 1));
            return Err(self.leave(Reason::Internal));
        };
        self.streams = streams;
        let prompt = match request {
            Ok(Opened::Reading(reading)) => Prompt::Reading(reading),
            Ok(Opened::Read(prepared)) => Prompt::Read(prepared),
            Err(Closed::BadRequest(err)) => {
                return Err(self.refuse(&Answer::bad_request(err)));
            }
            Err(Closed::Refused(refusal)) => {
                return Err(self.refuse(&Answer::refused(refusal)));
            }
        };
        let seams = splice.map(Seams::of);
        let tokens = TokenText::default();
        Ok(Begun { endpoint, len: body.len(), seams, prompt, tokens, body: Some(body) })
    }

    /// Places the request and hands it over.
    fn finish(&mut self, begun: Begun) -> Next {
        let Begun { endpoint, len, body, seams, prompt, tokens } = begun;
        let Prompt::Read(prepared) = prompt else { return self.leave(Reason::Internal) };
        let next = self.place(&prepared).unwrap_or(Next::Continue);
        if next == Next::Continue {
            self.count_prediction(&prepared);
            return match self.hand_over(endpoint, seams.as_ref(), &tokens, len, body) {
                Ok(()) => Next::Continue,
                Err(answered) => answered,
            };
        }
        next
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
    ///
    /// - `seams`: of a body that could be scanned.
    /// - `tokens`: of the prompt, if they are handed over.
    /// - `body`: if it is at hand.
    ///
    /// # Errors
    ///
    /// What to tell the host if the host refuses the new body, and the one that it
    /// has names a worker of the client's choosing.
    fn hand_over(
        &mut self,
        endpoint: Endpoint,
        seams: Option<&Seams>,
        tokens: &TokenText,
        len: usize,
        body: Option<Vec<u8>>,
    ) -> Result<(), Next> {
        let names_in_body = self.config.mode == Mode::Body && endpoint.reads_nvext();
        if self.config.mode != Mode::Body {
            self.name_workers();
        }
        let Some(seams) = seams else { return Ok(()) };
        let choice = self.placed.as_ref().map(|placed| &placed.choice);
        let tokens = Some(tokens).filter(|tokens| choice.is_some() && !tokens.is_empty());
        let named = choice.filter(|_| names_in_body).map(Choice::handover);
        if named.is_none() && tokens.is_none() && seams.nvext.is_empty() {
            return Ok(());
        }
        let body = body.or_else(|| host::buffer(Buffer::RequestBody, 0, len));
        let text = body.as_deref().filter(|body| body.len() == len).map(core::str::from_utf8);
        let Some(Ok(text)) = text else {
            return keep_body(seams);
        };
        let handover = Handover { token_text: tokens, ..named.unwrap_or_default() };
        let Ok(body) = hand_over(&seams.splice(text), &handover) else {
            vm::with(|vm| vm.metrics.add(Counter::NvextNotObject, 1));
            return Ok(());
        };
        if host::replace_buffer(Buffer::RequestBody, len, &body).is_err() {
            return keep_body(seams);
        }
        // A length that does not fit the new body would leave the worker
        // waiting for the rest. In mode `body` it is removed already.
        if self.config.mode == Mode::Endpoint && self.intake.length.is_some() {
            let length = body.len().to_string();
            if host::set_header(Headers::Request, "content-length", &length).is_err() {
                vm::with(|vm| vm.metrics.add(Counter::HostRefused, 1));
            }
        }
        Ok(())
    }
}

/// The host does not let the body be edited. A frontend would obey what the client's
/// own `nvext` says of workers, so a body that has one may not pass.
fn keep_body(seams: &Seams) -> Result<(), Next> {
    vm::with(|vm| vm.metrics.add(Counter::HostRefused, 1));
    if seams.nvext.is_empty() { Ok(()) } else { Err(Answer::body_kept().send()) }
}

impl Vm {
    /// Begins to read a request's body.
    fn open_body<'a>(&mut self, body: (Endpoint, &'a [u8]), intake: &Intake) -> Opening<'a> {
        let seconds = host::wall_clock_ns() / 1_000_000_000;
        let now = WallClock {
            unix_seconds: i64::try_from(seconds).unwrap_or(i64::MAX),
            utc_offset_seconds: 0,
        };
        let conditions = Conditions { salt_from_body: self.config.cache_salt_from_body, now };
        let Self { models, replica, random, .. } = self;
        open(models, replica.roster(), body, intake, conditions, random)
    }
}
