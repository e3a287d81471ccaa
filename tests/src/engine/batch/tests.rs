//! Tests of a batch's steps, worked out by hand.

use super::*;

const TIMING: Timing = Timing {
    step_us: 1000,
    prefill_us_per_token: 10,
    sequence_us: 100,
    context_ns_per_token: 1000,
    speedup: 1,
};

fn batch(step_tokens_max: usize, running_max: usize) -> Batch<u32> {
    Batch::new(TIMING, Bounds { step_tokens_max, running_max, stream_interval: 1 })
}

fn generation(from: u32, tokens: u32, output_tokens: usize) -> Generation {
    let prompt = (from..from + tokens).collect();
    Generation { prompt, output_tokens, keys: CacheKeys::default() }
}

fn reads(_: &u32) -> Client {
    Client::Reads
}

/// One step: its time in microseconds, and whose tokens went out.
fn step(batch: &mut Batch<u32>, cache: &mut PrefixCache) -> (u64, Vec<u32>) {
    let Plan::Step(nanoseconds) = batch.plan(cache, reads) else { return (0, Vec::new()) };
    let out = batch.complete(cache, |_, place| u32::try_from(place).unwrap());
    (nanoseconds / 1000, out.into_iter().map(|emission| emission.tag).collect())
}

/// Goal: prompts and answers slow each other down by just what the terms say.
#[test]
fn a_step_takes_what_is_in_it() {
    let mut cache = PrefixCache::new(4, 100);
    let mut batch = batch(64, 8);
    assert_eq!(batch.plan(&mut cache, reads), Plan::Idle);
    batch.add(1, generation(0, 20, 3));
    // 1000 + 20 · 10 + 100 + nothing to attend to before it.
    assert_eq!(step(&mut batch, &mut cache), (1300, vec![1]));
    // One token, 21 of context.
    assert_eq!(step(&mut batch, &mut cache), (1121, vec![1]));
    batch.add(2, generation(100, 8, 1));
    // The answer's last token beside the other's prompt: 1000 + 80 + 200 + 22.
    assert_eq!(step(&mut batch, &mut cache), (1302, vec![1, 2]));
    assert_eq!(batch.plan(&mut cache, reads), Plan::Idle);
    let counts = batch.counts();
    assert_eq!((counts.finished, counts.steps, counts.generated_tokens), (2, 3, 4));
    assert_eq!(counts.busy_ns, (1300 + 1121 + 1302) * 1000);
    assert_eq!(counts.request_ns, (1300 + 1121 + 2 * 1302) * 1000);
    assert_eq!(cache.blocks_used(), 0);
}

/// Goal: the budget cuts a long prompt into parts, answers come first, and
/// nobody overtakes.
#[test]
fn a_long_prompt_is_computed_in_parts() {
    let mut cache = PrefixCache::new(4, 100);
    let mut batch = batch(16, 8);
    batch.add(1, generation(0, 4, 9));
    assert_eq!(step(&mut batch, &mut cache).1, [1]);
    batch.add(2, generation(100, 40, 1));
    batch.add(3, generation(200, 4, 1));
    // 15 tokens of the second prompt a step, then 10 and the third's 4.
    assert_eq!(step(&mut batch, &mut cache).1, [1]);
    assert_eq!(step(&mut batch, &mut cache).1, [1]);
    assert_eq!(step(&mut batch, &mut cache).1, [1, 2, 3]);
}

/// Goal: what is cached is not computed, so it takes no time.
#[test]
fn a_cached_prefix_takes_no_time() {
    let mut cache = PrefixCache::new(4, 100);
    let mut batch = batch(64, 8);
    batch.add(1, generation(0, 40, 1));
    assert_eq!(step(&mut batch, &mut cache).0, 1000 + 400 + 100);
    batch.add(2, generation(0, 42, 1));
    // 2 tokens, and the 40 that they attend to.
    assert_eq!(step(&mut batch, &mut cache).0, 1000 + 20 + 100 + 40);
    assert_eq!(batch.counts().cached_tokens, 40);
}

/// Goal: a request that finds no room, or no place, waits, and comes in order.
#[test]
fn requests_wait_for_room() {
    let mut cache = PrefixCache::new(4, 4);
    let mut first = batch(64, 8);
    first.add(1, generation(0, 8, 3));
    first.add(2, generation(100, 12, 1));
    first.add(3, generation(200, 4, 1));
    let order: Vec<Vec<u32>> = (0..4).map(|_| step(&mut first, &mut cache).1).collect();
    assert_eq!(order, [vec![1], vec![1], vec![1], vec![2, 3]]);

    let mut narrow = batch(64, 1);
    narrow.add(1, generation(0, 4, 2));
    narrow.add(2, generation(0, 4, 1));
    let order: Vec<Vec<u32>> = (0..3).map(|_| step(&mut narrow, &mut cache).1).collect();
    assert_eq!(order, [vec![1], vec![1], vec![2]]);
}

/// Goal: whoever does not read gets no token, whoever has gone no block.
#[test]
fn clients_that_lag_or_leave_hold_nobody_up() {
    let mut cache = PrefixCache::new(4, 100);
    let mut batch = batch(64, 8);
    for tag in 1..=2 {
        batch.add(tag, generation(tag * 100, 8, 9));
    }
    assert_eq!(step(&mut batch, &mut cache).1, [1, 2]);
    let lags = |tag: &u32| if *tag == 1 { Client::Lags } else { Client::Reads };
    assert!(matches!(batch.plan(&mut cache, lags), Plan::Step(_)));
    let out = batch.complete(&mut cache, |_, _| 0);
    assert_eq!(out.into_iter().map(|emission| emission.tag).collect::<Vec<_>>(), [2]);
    assert_eq!(batch.plan(&mut cache, |_| Client::Lags), Plan::Stalled);
    assert_eq!(batch.plan(&mut cache, |_| Client::Gone), Plan::Idle);
    assert_eq!((batch.counts().aborted, cache.blocks_used()), (2, 0));
}

/// Goal: tokens go out in groups, none is lost, the first does not wait.
#[test]
fn tokens_go_out_in_groups() {
    let mut cache = PrefixCache::new(4, 100);
    let bounds = Bounds { step_tokens_max: 64, running_max: 8, stream_interval: 4 };
    let mut batch: Batch<u32> = Batch::new(TIMING, bounds);
    batch.add(1, generation(0, 8, 10));
    let mut groups = Vec::new();
    while batch.plan(&mut cache, reads) != Plan::Idle {
        let out = batch.complete(&mut cache, |_, _| 0);
        groups.extend(out.into_iter().map(|emission| (emission.first, emission.count)));
    }
    assert_eq!(groups, [(0, 1), (1, 4), (5, 4), (9, 1)]);
}
