//! Readers: the threads that read prompts and choose.
//!
//! Each has tokenizers and a prefix cache of its own, as each VM of a gateway
//! has. Beyond the most that may wait, a request's prompt is not read: it is
//! routed by load, before all others, for that takes next to no time.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::sync::oneshot;
use tracing::error;
use warmpath_core::answer::Answer;
use warmpath_core::card::BlobId;
use warmpath_core::choose::Random;
use warmpath_core::handover::{Handover, TokenText, hand_over};
use warmpath_core::intake::Intake;
use warmpath_core::models::Models;
use warmpath_core::prefix::PrefixCache;
use warmpath_core::reason::Reason;
use warmpath_core::render::WallClock;
use warmpath_core::request::{Endpoint, Splice};
use warmpath_core::route::{Closed, Conditions, Opened, Opening, Prepared, open};
use warmpath_core::tokenize::AlignedBytes;

use super::desk::{Desk, Ticket, View};
use crate::config::picker::PickerConfig;
use crate::limits::PICKER_STEP_BYTES;
use crate::publish::service::Shared;

/// What is to be decided.
#[derive(Debug)]
pub(super) enum Ask {
    /// By the prompt of a whole body.
    Body(Endpoint, Bytes),
    /// By load alone: why, and the body's length in bytes.
    ByLoad(Reason, usize),
}

/// What was decided.
#[derive(Debug)]
pub(super) enum Verdict {
    /// The request goes to its workers.
    Placed(Box<Placement>),
    /// It is answered, under a reason.
    Answered(Answer, Reason),
}

/// A request that goes to its workers.
#[derive(Debug)]
pub(super) struct Placement {
    pub(super) ticket: Ticket,
    /// What takes the place of the body, if something does.
    pub(super) body: Option<Bytes>,
    /// Whether the engine should report exactly what was predicted.
    pub(super) exact_prediction: bool,
    /// Whether the answer may come in parts, so that its first one tells something.
    pub(super) streams: bool,
    /// Time that the decision took.
    pub(super) spent: Duration,
}

#[derive(Debug)]
struct Job {
    ask: Ask,
    intake: Intake,
    /// Why the prompt is not to be read.
    give_up: Option<Reason>,
    since: Instant,
    verdict: oneshot::Sender<Verdict>,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Job>,
    /// Those that are only placed. There are at most as many as streams.
    crowded: VecDeque<Job>,
    has_ended: bool,
}

/// Where requests wait for a thread.
#[derive(Debug)]
pub(super) struct Readers {
    queue: Mutex<Queue>,
    has_come: Condvar,
    waiting_max: usize,
    shared: Arc<Shared>,
}

impl Readers {
    /// Starts the threads. They end with [`Readers::end`].
    ///
    /// # Errors
    ///
    /// If a thread cannot be started.
    pub(super) fn start(
        config: &Arc<PickerConfig>,
        desk: &Arc<Desk>,
        shared: &Arc<Shared>,
        seed: u64,
    ) -> std::io::Result<Arc<Self>> {
        let readers = Arc::new(Self {
            queue: Mutex::default(),
            has_come: Condvar::new(),
            waiting_max: config.readings_max,
            shared: Arc::clone(shared),
        });
        let mut random = Random::seeded(seed);
        for _ in 0..config.threads {
            let (config, desk, shared) = (Arc::clone(config), Arc::clone(desk), Arc::clone(shared));
            let (readers, seeds) = (Arc::clone(&readers), [random.next_u64(), random.next_u64()]);
            std::thread::Builder::new().name("picker".to_owned()).spawn(move || {
                let mut reader = Reader::new(config, desk, shared, seeds);
                while let Some(job) = readers.next() {
                    reader.serve(job);
                }
            })?;
        }
        Ok(readers)
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Decides. `None` if the threads have ended. May be dropped: then nothing is
    /// booked, or it is freed.
    pub(super) async fn decide(&self, ask: Ask, intake: Intake) -> Option<Verdict> {
        let (verdict, decided) = oneshot::channel();
        let is_by_load = matches!(ask, Ask::ByLoad(..));
        let mut job = Job { ask, intake, give_up: None, since: Instant::now(), verdict };
        {
            let mut queue = self.lock();
            if queue.has_ended {
                return None;
            }
            if is_by_load {
                queue.crowded.push_back(job);
            } else if queue.waiting.len() >= self.waiting_max {
                job.give_up = Some(Reason::ReadCrowded);
                queue.crowded.push_back(job);
            } else {
                queue.waiting.push_back(job);
            }
        }
        self.shared.metrics.picker.readings_begun.inc();
        self.has_come.notify_one();
        decided.await.ok()
    }

    fn next(&self) -> Option<Job> {
        let mut queue = self.lock();
        loop {
            if queue.has_ended {
                return None;
            }
            let job = queue.crowded.pop_front().or_else(|| queue.waiting.pop_front());
            if job.is_some() {
                return job;
            }
            queue = self.has_come.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends the threads, after what each is about.
    pub(super) fn end(&self) {
        let mut queue = self.lock();
        *queue = Queue { has_ended: true, ..Queue::default() };
        drop(queue);
        self.has_come.notify_all();
    }
}

/// One thread's own.
struct Reader {
    config: Arc<PickerConfig>,
    desk: Arc<Desk>,
    shared: Arc<Shared>,
    models: Models,
    cards_number: u64,
    random: Random,
}

impl Reader {
    fn new(
        config: Arc<PickerConfig>,
        desk: Arc<Desk>,
        shared: Arc<Shared>,
        [seed, prefix_seed]: [u64; 2],
    ) -> Self {
        let mut models = Models::default();
        *models.prefixes_mut() = PrefixCache::new(config.prefix_cache_bytes_max, prefix_seed);
        Self { config, desk, shared, models, cards_number: 0, random: Random::seeded(seed) }
    }

    fn serve(&mut self, job: Job) {
        let Job { ask, intake, give_up, since, verdict } = job;
        self.shared.metrics.picker.readings_ended.inc();
        if verdict.is_closed() {
            // The client has gone.
            return;
        }
        let started = Instant::now();
        let mut decided = self.decide(ask, &intake, give_up, since);
        let spent = started.elapsed();
        self.shared.metrics.picker.took(spent);
        if let Verdict::Placed(placement) = &mut decided {
            placement.spent = spent;
        }
        // Nobody may want it any more; then the ticket frees what was booked.
        let _ = verdict.send(decided);
    }

    fn decide(
        &mut self,
        ask: Ask,
        intake: &Intake,
        give_up: Option<Reason>,
        since: Instant,
    ) -> Verdict {
        match ask {
            Ask::ByLoad(reason, len) => match intake.demands(None) {
                Ok(demands) => {
                    let prepared = Prepared { demands, ..Prepared::by_load(reason, None, len) };
                    self.place(&prepared, None, None, true)
                }
                Err(refusal) => Verdict::Answered(Answer::refused(refusal), Reason::BadRequest),
            },
            Ask::Body(endpoint, body) => {
                let View { cards_number, cards, roster } = self.desk.view();
                if cards_number != self.cards_number {
                    self.cards_number = cards_number;
                    self.models.take_cards(&cards);
                }
                self.load_tokenizers();
                let conditions =
                    Conditions { salt_from_body: self.config.cache_salt_from_body, now: now() };
                let Opening { request, splice, streams } = open(
                    &mut self.models,
                    &roster,
                    (endpoint, &body),
                    intake,
                    conditions,
                    &mut self.random,
                );
                let prepared = match request {
                    Ok(opened) => self.read(opened, give_up, since),
                    Err(Closed::BadRequest(err)) => {
                        return Verdict::Answered(Answer::bad_request(err), Reason::BadRequest);
                    }
                    Err(Closed::Refused(refusal)) => {
                        return Verdict::Answered(Answer::refused(refusal), Reason::BadRequest);
                    }
                };
                let mut tokens = TokenText::default();
                if self.config.token_data && prepared.is_exact() {
                    tokens.write(&prepared.tokens, usize::MAX);
                }
                let tokens = (!tokens.is_empty()).then_some(&tokens);
                self.place(&prepared, splice.as_ref(), tokens, streams)
            }
        }
    }

    /// Loads the files that cards name and that are there.
    fn load_tokenizers(&mut self) {
        while let Some(blob) = self.models.wanted_blob() {
            let Some(bytes) = self.shared.blobs.find(blob) else { return };
            let file = AlignedBytes::from_slice(&bytes);
            if BlobId::of(file.as_bytes()) != blob || !self.models.load(blob, file) {
                self.shared.metrics.picker.tokenizers_refused.inc();
                error!("a tokenizer file cannot be used; its model is routed by load");
                return;
            }
        }
    }

    fn read(&mut self, opened: Opened, give_up: Option<Reason>, since: Instant) -> Prepared {
        let mut reading = match opened {
            Opened::Reading(reading) => reading,
            Opened::Read(prepared) => return *prepared,
        };
        let patience = Duration::from_millis(self.config.reading_ms_max);
        loop {
            let give_up =
                give_up.or_else(|| (since.elapsed() >= patience).then_some(Reason::ReadLate));
            if let Some(reason) = give_up {
                return reading.give_up(&self.models, reason);
            }
            if let Some(prepared) = reading.step(&mut self.models, PICKER_STEP_BYTES) {
                return prepared;
            }
        }
    }

    fn place(
        &self,
        prepared: &Prepared,
        splice: Option<&Splice<'_>>,
        tokens: Option<&TokenText>,
        streams: bool,
    ) -> Verdict {
        let ticket = match self.desk.place(prepared) {
            Ok(ticket) => ticket,
            Err(unplaced) => {
                let status = self.desk.settings().overload_status;
                return Verdict::Answered(Answer::unplaced(unplaced, status), unplaced.reason());
            }
        };
        let mut exact_prediction = false;
        if !prepared.hashes.is_empty() || !prepared.tokens.is_empty() {
            // A decode worker reports what it was handed, not what was computed.
            exact_prediction = prepared.is_exact() && ticket.choice.prefill.is_none();
            let metrics = &self.shared.metrics.picker;
            metrics.prompt_tokens.inc_by(prepared.prompt_tokens.into());
            let predicted = ticket.choice.predicted_cached_tokens;
            metrics.predicted_cached_tokens.inc_by(predicted.into());
        }
        let body = splice.and_then(|splice| self.edit(splice, tokens));
        let spent = Duration::ZERO;
        Verdict::Placed(Box::new(Placement { ticket, body, exact_prediction, streams, spent }))
    }

    /// The body that takes the place of the client's: with the tokens, and without
    /// what the client's own `nvext` says of workers, which a frontend would obey
    /// where our headers are silent.
    fn edit(&self, splice: &Splice<'_>, tokens: Option<&TokenText>) -> Option<Bytes> {
        if tokens.is_none() && splice.nvext.is_empty() {
            return None;
        }
        let handover = Handover { token_text: tokens, ..Handover::default() };
        match hand_over(splice, &handover) {
            Ok(body) => Some(body.into()),
            Err(_) => {
                self.shared.metrics.picker.nvext_not_object.inc();
                None
            }
        }
    }
}

fn now() -> WallClock {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let unix_seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    WallClock { unix_seconds, utc_offset_seconds: 0 }
}
