//! Reason: why a request was routed as it was.
//!
//! Every request that comes through the filter is counted under exactly one of
//! these words, so that routing that silently stops looking at caches is seen.
//! The list is closed; the words are part of the metrics' interface.

/// Why a request was routed as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// By overlap and load, with everything known.
    Kv,
    /// By overlap and load, on a feed that has not been heard of for a while.
    StaleFeed,
    /// By own decisions and load: workers are not asked what they hold
    /// (`use_kv_events=false`).
    Approximate,
    /// By overlap and load, on an index that is being taken anew.
    Resyncing,
    /// By load: the index has not been taken yet.
    Warming,
    /// By load: the model's files are still on their way.
    WarmingModel,
    /// By load: the prompt fills no block.
    ShortPrompt,
    /// By overlap of the first prompt of several.
    Batch,
    /// By load: the model's tokenizer cannot be used.
    BlindTokenizer,
    /// By load: the model has no chat template, or one that does not compile.
    BlindTemplate,
    /// By load: no worker of the model shows its cache.
    BlindWorkers,
    /// To a decode worker for the whole, or answered 503 if that is not
    /// allowed: the model's prefill workers are gone.
    PrefillUnavailable,
    /// By load over all workers: no worker serves a model of that name.
    UnknownModel,
    /// By load: the template refused the messages, or ran too long.
    RenderFailed,
    /// By load: the prompt is beyond what is tokenized here.
    PromptTooLong,
    /// By load: too many long prompts waited to be read.
    ReadCrowded,
    /// By load: the prompt was not read in time.
    ReadLate,
    /// By load: the client changes its prompt in a way that is not followed.
    AlteredPrompt,
    /// By load: the body is beyond what is looked at.
    BodyTooLarge,
    /// By load: the body could not be understood; the engine judges it.
    Unparsed,
    /// By load: an API whose prompts are not read (responses, embeddings,
    /// messages, models), or a request for one of ours without a body.
    ByLoadApi,
    /// By load: the gateway does not show the filter bodies while headers are
    /// held (`allow_on_headers_stop_iteration` is missing).
    WrongPairing,
    /// Left to the gateway's own balancing: not a path we route.
    NotOurPath,
    /// Answered 400: no engine could understand the body.
    BadRequest,
    /// Answered 503: no worker is there.
    NoWorkers,
    /// Answered 400: the request names a worker that is not there.
    UnknownPin,
    /// Answered 503: no worker has the taints that the request requires.
    ConstraintsUnsatisfied,
    /// Answered 503: the gateway's subset hint allows none of the workers.
    NoHosts,
    /// Answered 529, or what is configured: every worker that may serve the request
    /// is overloaded.
    Overloaded,
    /// Answered 429: as many prompts wait as a queue may hold.
    QueueFull,
    /// Left to the gateway's own balancing: something that cannot happen did.
    Internal,
}

impl Reason {
    /// Every reason, to define their counters once.
    pub const ALL: [Self; 31] = [
        Self::Kv,
        Self::StaleFeed,
        Self::Approximate,
        Self::Resyncing,
        Self::Warming,
        Self::WarmingModel,
        Self::ShortPrompt,
        Self::Batch,
        Self::BlindTokenizer,
        Self::BlindTemplate,
        Self::BlindWorkers,
        Self::PrefillUnavailable,
        Self::UnknownModel,
        Self::RenderFailed,
        Self::PromptTooLong,
        Self::ReadCrowded,
        Self::ReadLate,
        Self::AlteredPrompt,
        Self::BodyTooLarge,
        Self::Unparsed,
        Self::ByLoadApi,
        Self::WrongPairing,
        Self::NotOurPath,
        Self::BadRequest,
        Self::NoWorkers,
        Self::UnknownPin,
        Self::ConstraintsUnsatisfied,
        Self::NoHosts,
        Self::Overloaded,
        Self::QueueFull,
        Self::Internal,
    ];

    /// The word in metrics, headers and logs.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Kv => "kv",
            Self::StaleFeed => "stale_feed",
            Self::Approximate => "approximate",
            Self::Resyncing => "resyncing",
            Self::Warming => "warming",
            Self::WarmingModel => "warming_model",
            Self::ShortPrompt => "short_prompt",
            Self::Batch => "batch",
            Self::BlindTokenizer => "blind_tokenizer",
            Self::BlindTemplate => "blind_template",
            Self::BlindWorkers => "blind_workers",
            Self::PrefillUnavailable => "prefill_unavailable",
            Self::UnknownModel => "unknown_model",
            Self::RenderFailed => "render_failed",
            Self::PromptTooLong => "prompt_too_long",
            Self::ReadCrowded => "read_crowded",
            Self::ReadLate => "read_late",
            Self::AlteredPrompt => "altered_prompt",
            Self::BodyTooLarge => "body_too_large",
            Self::Unparsed => "unparsed",
            Self::ByLoadApi => "by_load_api",
            Self::WrongPairing => "wrong_pairing",
            Self::NotOurPath => "not_our_path",
            Self::BadRequest => "bad_request",
            Self::NoWorkers => "no_workers",
            Self::UnknownPin => "unknown_pin",
            Self::ConstraintsUnsatisfied => "constraints_unsatisfied",
            Self::NoHosts => "no_hosts",
            Self::Overloaded => "overloaded",
            Self::QueueFull => "queue_full",
            Self::Internal => "internal",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    #[test]
    fn words_are_distinct_and_fit_a_metric_name() {
        let mut words: Vec<&str> = Reason::ALL.iter().map(|reason| reason.word()).collect();
        assert!(words.iter().all(|w| w.chars().all(|c| c.is_ascii_lowercase() || c == '_')));
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), Reason::ALL.len());
    }
}
