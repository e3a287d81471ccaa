//! Session: one request's way through the picker.
//!
//! ```text
//! headers → strip → ours? → hold → body complete → decide → name → release
//! response: first piece of a stream → prefill done;  end, reset or anything else → free
//! ```
//!
//! What is held and when it is answered depends on how the gateway sends bodies:
//! streamed both ways, nothing is answered before the body is whole; buffered, the
//! headers are answered first and named with the body; in all other modes the
//! headers leave before the body is here, so their request is routed by load.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::{Bytes, BytesMut};
use warmpath_core::answer::Answer;
use warmpath_core::demands::Rules;
use warmpath_core::intake::{Intake, RequestHeaders};
use warmpath_core::reason::Reason;
use warmpath_core::request::Endpoint;
use warmpath_core::usage::ResponseReader;

use super::desk::Desk;
use super::message::{pairs, served, subset_hint};
use super::proto::{
    Body, BodyMode, HttpBody, HttpHeaders, Metadata, Part, ProcessingRequest, ProcessingResponse,
};
use super::readers::{Ask, Placement, Readers, Verdict};
use super::reply::{self, Change, Headers};
use crate::config::picker::PickerConfig;
use crate::metrics::Metrics;

/// Why a stream is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// A part came that cannot come now.
    Order,
    /// The gateway waits for no answers, so it cannot be told anything.
    Observing,
    /// We are stopping.
    Stopping,
}

impl Fault {
    /// The reason as it is counted.
    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::Order => "order",
            Self::Observing => "observing",
            Self::Stopping => "stopping",
        }
    }
}

/// What all sessions share.
#[derive(Debug)]
pub(super) struct Common {
    pub(super) config: Arc<PickerConfig>,
    pub(super) desk: Arc<Desk>,
    pub(super) readers: Arc<Readers>,
    pub(super) metrics: Arc<Metrics>,
    /// Bytes of bodies that are held.
    pub(super) held: AtomicUsize,
}

/// How far a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing has come yet.
    New,
    /// Held until its body is complete.
    Collecting(Endpoint),
    /// Released or answered.
    Through,
}

/// One request.
#[derive(Debug)]
pub(super) struct Session {
    common: Arc<Common>,
    phase: Phase,
    /// How bodies come.
    modes: (BodyMode, BodyMode),
    intake: Intake,
    /// Headers to be removed, until that is said.
    strip: Vec<String>,
    /// The body, as far as it is held.
    body: BytesMut,
    /// Bytes that count as held.
    held: usize,
    placement: Option<Placement>,
    reason: Option<Reason>,
    response: ResponseReader,
    has_answered: bool,
}

/// Replies, in order.
type Out = Vec<ProcessingResponse>;

impl Session {
    pub(super) fn new(common: Arc<Common>) -> Self {
        Self {
            common,
            phase: Phase::New,
            modes: (BodyMode::FullDuplexStreamed, BodyMode::FullDuplexStreamed),
            intake: Intake::default(),
            strip: Vec::new(),
            body: BytesMut::new(),
            held: 0,
            placement: None,
            reason: None,
            response: ResponseReader::new(),
            has_answered: false,
        }
    }

    /// Takes a message, and gives what it is answered.
    ///
    /// # Errors
    ///
    /// A [`Fault`], which ends the stream.
    pub(super) async fn take(&mut self, message: ProcessingRequest) -> Result<Out, Fault> {
        if message.observability_mode {
            return Err(Fault::Observing);
        }
        if let Some(config) = message.protocol_config {
            // A mode that is not known here lets the headers go, too.
            let mode = |mode| BodyMode::try_from(mode).unwrap_or(BodyMode::Streamed);
            self.modes = (mode(config.request_body_mode), mode(config.response_body_mode));
        }
        let metadata = message.metadata_context.as_ref();
        match message.request {
            None => Ok(Vec::new()),
            Some(_) if self.has_answered => Ok(Vec::new()),
            Some(Part::RequestHeaders(headers)) => self.request_headers(&headers, metadata).await,
            Some(_) if self.phase == Phase::New => Err(Fault::Order),
            Some(Part::RequestBody(body)) => self.request_body(body).await,
            Some(Part::RequestTrailers(_)) => self.request_trailers().await,
            Some(Part::ResponseHeaders(headers)) => Ok(self.response_headers(&headers, metadata)),
            Some(Part::ResponseBody(body)) => Ok(self.response_body(&body)),
            Some(Part::ResponseTrailers(_)) => {
                self.response_ended();
                Ok(vec![reply::response_trailers()])
            }
        }
    }

    async fn request_headers(
        &mut self,
        message: &HttpHeaders,
        metadata: Option<&Metadata>,
    ) -> Result<Out, Fault> {
        if self.phase != Phase::New {
            return Err(Fault::Order);
        }
        self.phase = Phase::Through;
        let config = Arc::clone(&self.common.config);
        let headers = RequestHeaders(pairs(message));
        let stripped = headers.stripped(config.cache_salt_header.as_deref());
        let mut count = 0_u64;
        let stripped: BTreeSet<&str> = stripped.inspect(|_| count += 1).collect();
        self.strip = stripped.into_iter().map(str::to_owned).collect();
        self.common.metrics.picker.headers_stripped.inc_by(count);
        let hint = metadata.and_then(subset_hint);
        if let Some(hint) = &hint {
            self.common.metrics.picker.subset_malformed.inc_by(hint.malformed.into());
        }
        let rules = Rules {
            trusts_pins: config.trust_pins,
            binds_sessions: self.common.desk.settings().session_affinity.is_some(),
        };
        match headers.read(rules, config.cache_salt_header.as_deref(), hint) {
            Ok(intake) => self.intake = intake,
            Err(refusal) => {
                return Ok(self.answer(&Answer::refused(refusal), Reason::BadRequest));
            }
        }
        let length = self.intake.length.unwrap_or(0);
        let by_load = match headers.endpoint() {
            // The gateway has nobody else to ask, so it is told somebody.
            None => Some(Reason::NotOurPath),
            Some(_) if !headers.posts() => Some(Reason::ByLoadApi),
            Some(_) if message.end_of_stream => Some(Reason::Unparsed),
            Some(_) if length > config.body_bytes_max => Some(Reason::BodyTooLarge),
            Some(endpoint) => match self.modes.0 {
                BodyMode::FullDuplexStreamed => {
                    self.phase = Phase::Collecting(endpoint);
                    return Ok(Vec::new());
                }
                BodyMode::Buffered | BodyMode::BufferedPartial => {
                    self.phase = Phase::Collecting(endpoint);
                    let headers = reply::mutation(Vec::new(), std::mem::take(&mut self.strip));
                    let change = Change { headers, ..Change::default() };
                    return Ok(vec![reply::request_headers(change)]);
                }
                BodyMode::None | BodyMode::Streamed => Some(Reason::WrongPairing),
            },
        };
        let ask = Ask::ByLoad(by_load.unwrap_or(Reason::Internal), length);
        match self.decide(ask).await? {
            Ok(()) => {
                let change = self.named(None, None);
                Ok(vec![self.with_metadata(reply::request_headers(change))])
            }
            Err(answered) => Ok(answered),
        }
    }

    async fn request_body(&mut self, piece: HttpBody) -> Result<Out, Fault> {
        let HttpBody { body, end_of_stream } = piece;
        let Phase::Collecting(endpoint) = self.phase else {
            return Ok(self.pass_on(body, end_of_stream));
        };
        if self.modes.0 == BodyMode::FullDuplexStreamed {
            if let Some(reason) = self.hold(&body) {
                return self.give_up_body(reason, end_of_stream).await;
            }
            if !end_of_stream {
                return Ok(Vec::new());
            }
            return self.decide_streamed(endpoint, true).await;
        }
        self.phase = Phase::Through;
        // With trailers behind it, a whole body does not end the stream.
        let is_cut = self.modes.0 == BodyMode::BufferedPartial && !end_of_stream;
        let is_long = body.len() > self.common.config.body_bytes_max;
        let ask = match self.hold(&body) {
            None => Ask::Body(endpoint, body),
            Some(reason) => Ask::ByLoad(reason, body.len()),
        };
        let ask = match ask {
            Ask::Body(_, body) if is_cut || is_long => {
                Ask::ByLoad(Reason::BodyTooLarge, body.len())
            }
            ask => ask,
        };
        let decided = self.decide(ask).await?;
        self.let_go();
        match decided {
            Ok(()) => {
                let body = self.placement.as_mut().and_then(|it| it.body.take());
                let length = body.as_ref().map(Bytes::len);
                let change = self.named(body.map(Body::Whole), length);
                Ok(vec![self.with_metadata(reply::request_body(change))])
            }
            Err(answered) => Ok(answered),
        }
    }

    async fn request_trailers(&mut self) -> Result<Out, Fault> {
        let Phase::Collecting(endpoint) = self.phase else {
            return Ok(vec![reply::request_trailers()]);
        };
        let mut out = if self.modes.0 == BodyMode::FullDuplexStreamed {
            self.decide_streamed(endpoint, false).await?
        } else {
            // Held, and the body never came: there was none.
            self.phase = Phase::Through;
            match self.decide(Ask::Body(endpoint, Bytes::new())).await? {
                Ok(()) => Vec::new(),
                Err(answered) => answered,
            }
        };
        if !self.has_answered {
            out.push(reply::request_trailers());
        }
        Ok(out)
    }

    /// The body, streamed both ways, is complete.
    async fn decide_streamed(&mut self, endpoint: Endpoint, ends: bool) -> Result<Out, Fault> {
        self.phase = Phase::Through;
        let body = self.body.split().freeze();
        let decided = self.decide(Ask::Body(endpoint, body.clone())).await?;
        self.let_go();
        match decided {
            Ok(()) => {
                let edited = self.placement.as_mut().and_then(|it| it.body.take());
                let length = edited.as_ref().map(Bytes::len);
                Ok(self.release(edited.unwrap_or(body), length, ends))
            }
            Err(answered) => Ok(answered),
        }
    }

    /// The body is not to be held any further: the request is routed without.
    async fn give_up_body(&mut self, reason: Reason, ends: bool) -> Result<Out, Fault> {
        self.phase = Phase::Through;
        let body = self.body.split().freeze();
        self.let_go();
        match self.decide(Ask::ByLoad(reason, body.len())).await? {
            Ok(()) => Ok(self.release(body, None, ends)),
            Err(answered) => Ok(answered),
        }
    }

    /// Lets headers and body of a request go that were held.
    ///
    /// - `length`: of the body, if it is another.
    fn release(&mut self, body: Bytes, length: Option<usize>, ends: bool) -> Out {
        let change = self.named(None, length);
        let mut out = vec![self.with_metadata(reply::request_headers(change))];
        let piece = |body| Change { body: Some(body), ..Change::default() };
        out.extend(
            reply::pieces(body, ends).into_iter().map(|body| reply::request_body(piece(body))),
        );
        out
    }

    /// A piece of a body that is not held.
    fn pass_on(&self, body: Bytes, ends: bool) -> Out {
        if self.modes.0 != BodyMode::FullDuplexStreamed {
            return vec![reply::request_body(Change::default())];
        }
        let piece = |body| Change { body: Some(body), ..Change::default() };
        reply::pieces(body, ends).into_iter().map(|it| reply::request_body(piece(it))).collect()
    }

    /// Holds a piece of the body. Returns why it is the last, if it is.
    fn hold(&mut self, piece: &Bytes) -> Option<Reason> {
        self.body.extend_from_slice(piece);
        self.held += piece.len();
        let held = self.common.held.fetch_add(piece.len(), Ordering::Relaxed) + piece.len();
        if self.body.len() > self.common.config.body_bytes_max {
            return Some(Reason::BodyTooLarge);
        }
        (held > self.common.config.reading_bytes_max).then_some(Reason::ReadCrowded)
    }

    fn let_go(&mut self) {
        self.body = BytesMut::new();
        let held = std::mem::take(&mut self.held);
        self.common.held.fetch_sub(held, Ordering::Relaxed);
    }

    /// Decides. What the gateway is told is the error, if that ends it.
    async fn decide(&mut self, ask: Ask) -> Result<Result<(), Out>, Fault> {
        let intake = std::mem::take(&mut self.intake);
        let length = intake.length;
        let verdict = self.common.readers.decide(ask, intake).await.ok_or(Fault::Stopping)?;
        self.intake.length = length;
        match verdict {
            Verdict::Placed(placement) => {
                self.set_reason(placement.ticket.choice.reason);
                self.placement = Some(*placement);
                Ok(Ok(()))
            }
            Verdict::Answered(answer, reason) => Ok(Err(self.answer(&answer, reason))),
        }
    }

    fn set_reason(&mut self, reason: Reason) {
        if self.reason.is_none() {
            self.reason = Some(reason);
            self.common.metrics.picker.decided(reason);
        }
    }

    fn answer(&mut self, answer: &Answer, reason: Reason) -> Out {
        self.set_reason(reason);
        self.has_answered = true;
        vec![reply::immediate(answer, self.reason, self.debug_headers(None))]
    }

    /// What names the workers, and takes away what the client said of them.
    ///
    /// - `length`: of the body, if it is another.
    fn named(&mut self, body: Option<Body>, length: Option<usize>) -> Change {
        let Some(placement) = &self.placement else { return Change::default() };
        let mut names = reply::names(&placement.ticket.choice, &self.common.config);
        // A length that does not fit the new body would leave the worker waiting.
        if let Some(length) = length.filter(|_| self.intake.length.is_some()) {
            names.push(("content-length", length.to_string()));
        }
        let headers = reply::mutation(names, std::mem::take(&mut self.strip));
        Change { headers, body, is_placed: true }
    }

    fn with_metadata(&self, message: ProcessingResponse) -> ProcessingResponse {
        let choice = self.placement.as_ref().map(|it| &it.ticket.choice);
        let metadata = reply::metadata(choice, self.reason);
        ProcessingResponse { dynamic_metadata: Some(metadata), ..message }
    }

    fn response_headers(&mut self, message: &HttpHeaders, metadata: Option<&Metadata>) -> Out {
        let served = metadata.and_then(served);
        if let (Some(served), Some(placement)) = (&served, &self.placement) {
            let chosen = &placement.ticket.choice.serving.endpoint;
            self.common.metrics.picker.served_by(served == chosen);
        }
        let headers = reply::mutation(self.debug_headers(served), Vec::new());
        if message.end_of_stream {
            self.response_ended();
        } else if self.modes.1 == BodyMode::None
            && let Some(placement) = &mut self.placement
            && placement.streams
        {
            // No piece of it will be seen.
            placement.ticket.began();
        }
        vec![reply::response_headers(Change { headers, ..Change::default() })]
    }

    fn debug_headers(&self, served: Option<String>) -> Headers {
        let Some(reason) = self.reason.filter(|_| self.common.config.debug_headers) else {
            return Headers::new();
        };
        let mut headers = vec![("x-warmpath-reason", reason.word().to_owned())];
        if let Some(Placement { ticket, spent, .. }) = &self.placement {
            let spent_us = u64::try_from(spent.as_micros()).unwrap_or(u64::MAX);
            headers.extend(ticket.choice.debug_headers(spent_us));
        }
        headers.extend(served.map(|served| ("x-warmpath-served", served)));
        headers
    }

    fn response_body(&mut self, piece: &HttpBody) -> Out {
        if let Some(placement) = &mut self.placement
            && !piece.body.is_empty()
        {
            // An answer that comes at once ends as it begins: its end says all.
            if placement.streams {
                placement.ticket.began();
            }
            self.response.feed(&piece.body);
            let tokens = self.response.take_new_tokens();
            if tokens > 0 {
                placement.ticket.answered(tokens);
            }
        }
        if piece.end_of_stream {
            self.response_ended();
        }
        if self.modes.1 != BodyMode::FullDuplexStreamed {
            return vec![reply::response_body(Change::default())];
        }
        let same = |body| Change { body: Some(body), ..Change::default() };
        reply::pieces(piece.body.clone(), piece.end_of_stream)
            .into_iter()
            .map(|body| reply::response_body(same(body)))
            .collect()
    }

    /// The response is complete: compares what the engine reports with what was
    /// predicted, and frees what is booked.
    fn response_ended(&mut self) {
        let response = std::mem::take(&mut self.response);
        let Some(placement) = self.placement.take() else { return };
        if !placement.exact_prediction {
            return;
        }
        if let Some(cached) = response.finish().and_then(|usage| usage.cached_tokens) {
            let predicted = placement.ticket.choice.predicted_cached_tokens;
            self.common.metrics.picker.observed(cached, predicted.into());
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.let_go();
    }
}
