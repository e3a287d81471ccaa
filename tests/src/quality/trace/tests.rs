//! Tests of the traces: what they are made for, from the tokens alone.

use std::collections::HashSet;
use std::path::Path;

use super::*;
use crate::engine::cache::{CacheKeys, block_hashes};
use crate::quality::engines::BLOCK_SIZE;

fn model() -> Model {
    Model::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny")).unwrap()
}

/// Share of the tokens that a cache without end would hold.
fn best_hits(trace: &Trace) -> f64 {
    let mut seen = HashSet::new();
    let (mut hits, mut all) = (0, 0);
    for request in &trace.requests {
        let hashes = block_hashes(&request.prompt, BLOCK_SIZE, &CacheKeys::default());
        hits += hashes.iter().take_while(|hash| seen.contains(*hash)).count() * BLOCK_SIZE;
        all += request.prompt.len();
        seen.extend(hashes);
    }
    f64::from(u32::try_from(hits).unwrap()) / f64::from(u32::try_from(all).unwrap())
}

/// Goal: same seed, same trace; and each has what it is there for: turns that come
/// again, the recorded lengths and overlaps, one prefix that most requests share.
#[test]
fn traces_are_what_they_are_for() {
    let model = model();
    let make = |kind| Trace::new(kind, &model, 1, 1.0).unwrap();
    let conversations = make(Kind::Conversations);
    let again = make(Kind::Conversations);
    assert!(
        conversations
            .requests
            .iter()
            .map(|it| &it.prompt)
            .eq(again.requests.iter().map(|it| &it.prompt))
    );
    let best = best_hits(&conversations);
    // Answers come on top: they are cached as well, and come again.
    assert!((0.70..0.76).contains(&best), "{best}");

    let mooncake = make(Kind::Mooncake);
    let mean = mooncake.prompt_tokens() / mooncake.requests.len();
    assert!((3_300..3_700).contains(&mean), "{mean}");
    // 0.241 in the recorded blocks.
    assert!((0.23..0.26).contains(&best_hits(&mooncake)), "{}", best_hits(&mooncake));

    let hot = make(Kind::HotPrefix);
    let shared = hot.requests.iter().filter(|it| it.prompt.len() > 8_192).count();
    assert!((85..95).contains(&(shared * 100 / hot.requests.len())));
    let prompts: Vec<&[u32]> = hot.requests.iter().map(|it| it.prompt.as_slice()).collect();
    let long: Vec<&&[u32]> = prompts.iter().filter(|it| it.len() > 8_192).collect();
    assert!(long.iter().all(|it| it[..8_192] == long[0][..8_192]));
    assert!(hot.requests.is_sorted_by_key(|it| it.at_us));
}

/// Goal: twice the load is the same requests in half of the time.
#[test]
fn load_shortens_the_time_only() {
    let model = model();
    let make = |load| Trace::new(Kind::HotPrefix, &model, 1, load).unwrap();
    let (once, twice) = (make(1.0), make(2.0));
    assert_eq!(once.requests.len(), twice.requests.len());
    assert!(once.span_us().abs_diff(2 * twice.span_us()) < 10);
    let body: Value = serde_json::from_slice(&once.requests[0].body("m")).unwrap();
    assert_eq!(body["max_tokens"], once.requests[0].output_tokens);
}
