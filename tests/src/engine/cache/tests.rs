//! Tests of the prefix cache: worked cases, and a naive model under random
//! operations.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

fn keys() -> CacheKeys {
    CacheKeys::default()
}

fn prompt(tokens: usize, first: u32) -> Vec<u32> {
    (first..).take(tokens).collect()
}

/// Goal: the last token is always computed, at every length around a border.
/// Method: run the same prompt twice in an empty cache; the second report must
/// follow the rule and nothing else.
#[test]
fn a_full_hit_leaves_the_last_token() {
    for tokens in 1..=13 {
        let mut cache = PrefixCache::new(4, 16);
        let prompt = prompt(tokens, 100);
        let first = cache.admit(&prompt, 1, keys()).unwrap();
        assert_eq!(first.cached_tokens(), 0, "tokens={tokens}");
        cache.finish(first);

        let second = cache.admit(&prompt, 1, keys()).unwrap();

        assert_eq!(second.cached_tokens(), (tokens - 1) / 4 * 4, "tokens={tokens}");
    }
}

/// Goal: a block computed again is a second physical block with the same
/// hash, announced twice and gone only after two removals.
#[test]
fn a_block_computed_again_is_announced_again() {
    let mut cache = PrefixCache::new(4, 4);
    let prompt = prompt(4, 0);
    let first = cache.admit(&prompt, 1, keys()).unwrap();
    cache.finish(first);
    let second = cache.admit(&prompt, 1, keys()).unwrap();
    cache.finish(second);

    let events = cache.take_events();

    assert_eq!(events.len(), 2, "{events:?}");
    assert_eq!(events[0], events[1]);
    assert_eq!(cache.blocks_cached(), 2);
}

/// Goal: of a finished request the tail goes first.
#[test]
fn tails_are_evicted_before_their_prefixes() {
    let mut cache = PrefixCache::new(2, 4);
    let long = prompt(8, 0);
    let sequence = cache.admit(&long, 1, keys()).unwrap();
    cache.finish(sequence);
    cache.take_events();

    let other = cache.admit(&prompt(3, 50), 1, keys()).unwrap();
    cache.finish(other);

    let again = cache.admit(&long, 1, keys()).unwrap();
    assert_eq!(again.cached_tokens(), 4, "two of four blocks were taken from the tail");
}

/// Goal: what runs cannot be evicted, and a request waits rather than steal.
#[test]
fn running_requests_pin_their_blocks() {
    let mut cache = PrefixCache::new(2, 4);
    let running = cache.admit(&prompt(5, 0), 1, keys()).unwrap();

    assert_eq!(cache.admit(&prompt(3, 50), 1, keys()).unwrap_err(), AdmitError::Full);
    assert_eq!(cache.admit(&prompt(9, 50), 1, keys()).unwrap_err(), AdmitError::TooLong);
    assert!(!cache.clear(), "cleared under a running request");

    cache.finish(running);
    assert!(cache.admit(&prompt(3, 50), 1, keys()).is_ok());
}

/// Goal: room for the answer is promised at admission, so that decoding never
/// finds the pool empty.
#[test]
fn the_answer_has_its_room() {
    let mut cache = PrefixCache::new(2, 4);
    let mut sequence = cache.admit(&prompt(2, 0), 5, keys()).unwrap();
    assert_eq!(cache.admit(&prompt(3, 50), 1, keys()).unwrap_err(), AdmitError::Full);
    for token in 0..4 {
        assert!(cache.extend(&mut sequence, token), "token={token}");
    }
    assert!(!cache.extend(&mut sequence, 9) || sequence.blocks() <= 3);
    cache.finish(sequence);
    assert_eq!(cache.blocks_used(), 0);
}

/// Goal: a salt or an adapter separates caches, whichever it is.
#[test]
fn salts_and_adapters_do_not_share() {
    let with = |lora: Option<&str>, salt: Option<&str>| CacheKeys {
        lora_name: lora.map(Into::into),
        cache_salt: salt.map(Into::into),
    };
    let all =
        [with(None, None), with(Some("a"), None), with(None, Some("a")), with(Some("b"), None)];
    let mut cache = PrefixCache::new(2, 32);
    for keys in &all {
        let sequence = cache.admit(&prompt(5, 0), 1, keys.clone()).unwrap();
        assert_eq!(sequence.cached_tokens(), 0, "{keys:?}");
        cache.finish(sequence);
    }
    for keys in &all {
        let sequence = cache.admit(&prompt(5, 0), 1, keys.clone()).unwrap();
        assert_eq!(sequence.cached_tokens(), 4, "{keys:?}");
        cache.finish(sequence);
    }
}

/// One step of a random run.
#[derive(Clone, Debug)]
enum Step {
    Admit { prompt: Vec<u32>, output: usize, salted: bool },
    Extend { which: usize, token: u32 },
    Finish { which: usize },
    Clear,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (prop::collection::vec(0_u32..2, 0..14), 1_usize..6, any::<bool>())
            .prop_map(|(prompt, output, salted)| Step::Admit { prompt, output, salted }),
        6 => (any::<usize>(), 0_u32..2).prop_map(|(which, token)| Step::Extend { which, token }),
        4 => any::<usize>().prop_map(|which| Step::Finish { which }),
        1 => Just(Step::Clear),
    ];
    prop::collection::vec(step, 0..80)
}

/// A slot of the naive model: its whole prefix instead of a hash.
#[derive(Clone, Debug, Default)]
struct Slot {
    prefix: Option<(bool, Vec<u32>)>,
    users: usize,
}

/// The cache again, without hashes, maps or stamps.
struct Naive {
    block_size: usize,
    slots: Vec<Slot>,
    queue: Vec<usize>,
    promised: usize,
}

/// A request in the model.
struct NaiveSequence {
    salted: bool,
    tokens: Vec<u32>,
    slots: Vec<usize>,
    stored: usize,
    blocks_max: usize,
    cached: usize,
}

impl Naive {
    fn admit(&mut self, prompt: &[u32], output: usize, salted: bool) -> Option<NaiveSequence> {
        let blocks_max = (prompt.len() + output - 1).div_ceil(self.block_size);
        let mut slots = Vec::new();
        for end in (self.block_size..prompt.len()).step_by(self.block_size) {
            let wanted = (salted, prompt[..end].to_vec());
            match self.slots.iter().position(|slot| slot.prefix.as_ref() == Some(&wanted)) {
                Some(slot) => slots.push(slot),
                None => break,
            }
        }
        let idle = slots.iter().filter(|&&slot| self.slots[slot].users == 0).count();
        if blocks_max - slots.len() + idle + self.promised > self.queue.len() {
            return None;
        }
        for &slot in &slots {
            self.queue.retain(|&queued| queued != slot);
            self.slots[slot].users += 1;
        }
        self.promised += blocks_max - slots.len();
        let cached = slots.len() * self.block_size;
        let stored = slots.len();
        let tokens = prompt.to_vec();
        let mut sequence = NaiveSequence { salted, tokens, slots, stored, blocks_max, cached };
        while sequence.slots.len() * self.block_size < prompt.len() {
            self.take(&mut sequence);
        }
        self.store(&mut sequence);
        Some(sequence)
    }

    fn take(&mut self, sequence: &mut NaiveSequence) {
        let slot = self.queue.remove(0);
        self.promised -= 1;
        self.slots[slot] = Slot { prefix: None, users: 1 };
        sequence.slots.push(slot);
    }

    fn store(&mut self, sequence: &mut NaiveSequence) {
        while (sequence.stored + 1) * self.block_size <= sequence.tokens.len() {
            let end = (sequence.stored + 1) * self.block_size;
            let prefix = (sequence.salted, sequence.tokens[..end].to_vec());
            self.slots[sequence.slots[sequence.stored]].prefix = Some(prefix);
            sequence.stored += 1;
        }
    }

    fn extend(&mut self, sequence: &mut NaiveSequence, token: u32) -> bool {
        if sequence.tokens.len() == sequence.slots.len() * self.block_size {
            if sequence.slots.len() == sequence.blocks_max {
                return false;
            }
            self.take(sequence);
        }
        sequence.tokens.push(token);
        self.store(sequence);
        true
    }

    fn finish(&mut self, sequence: &NaiveSequence) {
        self.promised -= sequence.blocks_max - sequence.slots.len();
        for &slot in sequence.slots.iter().rev() {
            self.slots[slot].users -= 1;
            if self.slots[slot].users == 0 {
                self.queue.push(slot);
            }
        }
    }
}

/// What a subscriber that counts references knows after some events.
#[derive(Default)]
struct Subscriber {
    counts: HashMap<EngineHash, usize>,
    prefixes: HashMap<EngineHash, Vec<u32>>,
}

impl Subscriber {
    fn apply(&mut self, events: Vec<CacheEvent>, block_size: usize) {
        for event in events {
            match event {
                CacheEvent::Stored { parent, hashes, tokens, keys } => {
                    assert_eq!(hashes.len() * block_size, tokens.len());
                    let mut prefix = match parent {
                        // An evicted parent cannot have a child stored: it is pinned.
                        Some(parent) => self.prefixes[&parent].clone(),
                        None => vec![u32::from(keys.cache_salt.is_some())],
                    };
                    for (hash, block) in hashes.iter().zip(tokens.chunks(block_size)) {
                        prefix.extend_from_slice(block);
                        *self.counts.entry(*hash).or_default() += 1;
                        self.prefixes.insert(*hash, prefix.clone());
                    }
                }
                CacheEvent::Removed { hash } => {
                    let count = self.counts.get_mut(&hash).expect("removed what was not stored");
                    *count -= 1;
                    if *count == 0 {
                        self.counts.remove(&hash);
                    }
                }
                CacheEvent::Cleared => self.counts.clear(),
            }
        }
    }

    /// Cached tokens that a router would predict from the events alone.
    fn predict(&self, prompt: &[u32], salted: bool, block_size: usize) -> usize {
        let held: Vec<&Vec<u32>> = self.counts.keys().map(|hash| &self.prefixes[hash]).collect();
        let mut tokens = 0;
        while tokens + block_size < prompt.len() {
            let mut wanted = vec![u32::from(salted)];
            wanted.extend_from_slice(&prompt[..tokens + block_size]);
            if !held.contains(&&wanted) {
                break;
            }
            tokens += block_size;
        }
        tokens
    }
}

proptest! {
    /// Goal: hits, evictions and refusals equal a model too simple to be
    /// wrong, and a subscriber predicts every hit from the events alone.
    /// Method: random admissions over a two-letter alphabet (so that prefixes
    /// meet), extensions, finishes and clears in a pool of 1 to 12 blocks.
    #[test]
    fn equals_the_naive_model(block_size in 1_usize..5, blocks in 1_usize..12, steps in steps()) {
        let mut cache = PrefixCache::new(block_size, blocks);
        let mut naive = Naive {
            block_size,
            slots: vec![Slot::default(); blocks],
            queue: (0..blocks).collect(),
            promised: 0,
        };
        let mut subscriber = Subscriber::default();
        let mut running: Vec<(Sequence, NaiveSequence)> = Vec::new();
        for step in steps {
            match step {
                Step::Admit { prompt, output, salted } => {
                    let predicted = subscriber.predict(&prompt, salted, block_size);
                    let salt = CacheKeys { cache_salt: salted.then(|| "s".into()), ..keys() };
                    let expected = naive.admit(&prompt, output, salted);
                    let actual = cache.admit(&prompt, output, salt);
                    match (expected, actual) {
                        (Some(expected), Ok(actual)) => {
                            prop_assert_eq!(actual.cached_tokens(), expected.cached);
                            prop_assert_eq!(actual.cached_tokens(), predicted);
                            running.push((actual, expected));
                        }
                        (None, Err(_)) => {}
                        (expected, actual) => {
                            prop_assert!(false, "{:?} {:?}", expected.is_some(), actual);
                        }
                    }
                }
                Step::Extend { which, token } if !running.is_empty() => {
                    let which = which % running.len();
                    let (sequence, expected) = &mut running[which];
                    prop_assert_eq!(
                        cache.extend(sequence, token),
                        naive.extend(expected, token)
                    );
                }
                Step::Finish { which } if !running.is_empty() => {
                    let (sequence, expected) = running.swap_remove(which % running.len());
                    cache.finish(sequence);
                    naive.finish(&expected);
                }
                Step::Clear => {
                    prop_assert_eq!(cache.clear(), running.is_empty());
                    if running.is_empty() {
                        naive.slots.iter_mut().for_each(|slot| slot.prefix = None);
                    }
                }
                Step::Extend { .. } | Step::Finish { .. } => {}
            }
            subscriber.apply(cache.take_events(), block_size);
            let held = naive.slots.iter().filter(|slot| slot.prefix.is_some()).count();
            prop_assert_eq!(cache.blocks_cached(), held);
            prop_assert_eq!(subscriber.counts.values().sum::<usize>(), held);
            prop_assert_eq!(cache.blocks_used(), blocks - naive.queue.len());
        }
    }
}
