//! A cache under test stands beside encoding each text anew, with a tokenizer
//! that is too simple to be wrong.

use core::slice::SliceIndex;

use super::*;
use crate::choose::Random;
use crate::hash::{Salt, sequence_hashes};

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

const SHAPE: BlockShape = BlockShape { block_size: 16, eagle: false };
const SCOPE: Scope = Scope { tokenizer: 1, seed: 1337 };

/// A token for each word with the space before it, so that a word's token depends
/// on the character behind it: whether that is a space.
fn encode(text: &str, tokenizer: u32) -> Vec<TokenId> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(word) = rest.get(..word_end(rest)).filter(|word| !word.is_empty()) {
        tokens
            .push(word.bytes().fold(tokenizer, |sum, byte| sum.wrapping_mul(31) ^ u32::from(byte)));
        rest = part(rest, word.len()..);
    }
    tokens
}

fn part(text: &str, range: impl SliceIndex<str, Output = str>) -> &str {
    text.get(range).unwrap()
}

fn word_end(text: &str) -> usize {
    let first = text.chars().next().map_or(0, char::len_utf8);
    part(text, first..).find(' ').map_or(text.len(), |space| first + space)
}

/// The borders of a text: each but the last end of a word.
fn borders(text: &str) -> Vec<Border> {
    let (mut at, mut found) = (0, Vec::new());
    loop {
        at += word_end(part(text, at..));
        if at >= text.len() {
            return found;
        }
        found.push(Border { at, seen_to: at + 1, tokens: found.len() + 1 });
    }
}

struct Bench {
    cache: PrefixCache,
    random: Random,
}

impl Bench {
    fn new(bytes_max: usize) -> Self {
        Self { cache: PrefixCache::new(bytes_max, 0x5eed), random: Random::seeded(3) }
    }

    /// Reads a text with the cache, checks all that comes, and remembers it. Bytes
    /// that were known.
    fn read(&mut self, scope: Scope, shape: BlockShape, text: &str) -> usize {
        let expected = encode(text, scope.tokenizer);
        let mut hashes = Vec::new();
        let salt = Salt::default();
        sequence_hashes(&expected, shape, salt, &mut hashes);
        let (mut tokens, mut known_hashes) = (Vec::new(), Vec::new());
        let mut trail = self.cache.find(scope, text, shape, &mut tokens, &mut known_hashes);
        let known = trail.border();
        assert!(text.is_char_boundary(known.at));
        assert_eq!(tokens, expected[..known.tokens]);
        assert_eq!(known_hashes, hashes[..known_hashes.len()]);
        assert!(known_hashes.len() <= shape.blocks(known.tokens));
        let rest = part(text, known.at..);
        let resumed = encode(rest, scope.tokenizer);
        assert_eq!(resumed, expected[known.tokens..], "a border to resume from");
        for border in borders(text) {
            assert!(border.at != known.at || border.tokens == known.tokens);
            if border.at > known.at && self.random.below(3) == 0 {
                self.cache.remember(&mut trail, text, border, &expected);
            }
        }
        self.cache.remember_hashes(&trail, shape, &hashes);
        self.check();
        known.at
    }

    /// Checks what the parts of the cache say of each other.
    fn check(&self) {
        let cache = &self.cache;
        let is_free = |index: u32| cache.free.contains(&index);
        let live = || (0..cache.nodes.len()).filter(|i| !is_free(u32::try_from(*i).unwrap()));
        let node = |index: u32| &cache.nodes[index as usize];
        assert_eq!(cache.bytes, live().map(|index| cache.nodes[index].bytes()).sum::<usize>());
        assert_eq!(cache.by_window.len(), live().count());
        for index in live() {
            let own = u32::try_from(index).unwrap();
            let is_child = |other: &usize| cache.nodes[*other].parent == Some(own);
            let children = live().filter(is_child).count();
            assert_eq!(cache.nodes[index].children as usize, children);
            assert!(cache.nodes[index].parent.is_none_or(|parent| !is_free(parent)));
            let key = cache.nodes[index].key;
            assert!(cache.by_window.iter_hash(key).filter(|i| node(**i).key == key).count() <= 8);
        }
        let (mut listed, mut next, mut before) = (0, cache.leaves.oldest(), None);
        while let Some(index) = next {
            assert!(node(index).children == 0 && !is_free(index));
            assert_eq!(node(index).links.older(), before);
            (listed, before, next) = (listed + 1, next, node(index).links.newer());
        }
        assert_eq!(listed, live().filter(|index| cache.nodes[*index].children == 0).count());
    }
}

/// About `bytes` of words, the same for the same seed.
fn words(seed: u64, bytes: usize) -> String {
    let mut random = Random::seeded(seed);
    let mut text = String::new();
    while text.len() < bytes {
        text.push_str(
            [" the", " straße", " x", " 中文字", "  ", " wonderful"][random.below(6) as usize],
        );
        if random.below(4) == 0 {
            text.push_str(&random.below(1_000).to_string());
        }
    }
    text
}

#[test]
fn the_next_turn_finds_the_turns_before() {
    let mut bench = Bench::new(1 << 20);
    let mut text = words(1, 300);
    let mut known = Vec::new();
    for turn in 0..20 {
        known.push(text.len() - bench.read(SCOPE, SHAPE, &text));
        text.push_str(&words(turn + 2, 1_500));
    }
    // A turn, and the end of the one before that filled no chunk.
    assert!(known.iter().all(|unknown| *unknown < 1_600 + 1_500), "{known:?}");
    let counters = bench.cache.counters();
    assert_eq!((counters.lookups, counters.evicted, counters.refused), (20, 0, 0));
    assert!(counters.hits >= 18 && counters.bytes_saved > 200_000, "{counters:?}");
    let turns_before = text.len() * 10;
    assert!(bench.cache.bytes() < turns_before, "shared turns are held once");
}

/// Goal: with whatever was read before and forgotten since, the tokens and hashes
/// are those of reading without a cache.
/// Method: conversations that grow, branch, change in the middle, and go on in
/// other scopes and shapes, under limits from a few chunks on.
#[test]
fn what_is_known_is_what_is_true() {
    let shapes = [SHAPE, BlockShape { block_size: 4, eagle: true }];
    for bytes_max in [0, 10_000, 40_000, 400_000, 1 << 24] {
        let mut bench = Bench::new(bytes_max);
        let mut random = Random::seeded(bytes_max as u64);
        let mut texts = vec![words(9, 4_000)];
        let mut known = 0;
        for round in 0..300 {
            let at = random.below(u32::try_from(texts.len()).unwrap()) as usize;
            let mut text = texts[at].clone();
            let mut cut = random.below(u32::try_from(text.len()).unwrap()) as usize;
            cut = (0..=cut).rev().find(|at| text.is_char_boundary(*at)).unwrap();
            match random.below(5) {
                0 => text.truncate(cut),
                1 => text.insert(cut, ['y', ' ', 'ß'][random.below(3) as usize]),
                _ => {}
            }
            if random.below(8) > 0 {
                text.push_str(&words(round, random.below(2_500) as usize));
            }
            let scope = Scope { tokenizer: 1 + random.below(2), seed: random.below(2).into() };
            known += bench.read(scope, shapes[random.below(2) as usize], &text);
            assert!(bench.cache.bytes() <= bytes_max, "{}", bench.cache.bytes());
            match texts.len() {
                0..8 => texts.push(text),
                _ => texts[at] = text,
            }
        }
        assert_eq!(known > 0, bytes_max > 0, "{known} with {bytes_max}");
        assert_eq!(bench.cache.counters().bytes_saved, known as u64);
    }
}

/// Goal: texts whose windows collide are told apart, and are not many.
/// Method: windows that differ only between the bytes that are hashed, and those
/// that do not differ at all.
#[test]
fn windows_that_collide_are_told_apart() {
    let mut bench = Bench::new(1 << 20);
    let window = words(5, PREFIX_CHUNK_BYTES);
    let text = |replaced: char, tail: &str| {
        format!("{replaced}{}{tail}{}", part(&window, 1..), words(6, 3_000))
    };
    let mut known = Vec::new();
    for round in 0..2 {
        for letter in 'a'..='z' {
            for tail in ["s", " t", "tt"] {
                known.push(bench.read(SCOPE, SHAPE, &text(letter, tail)));
            }
        }
        assert!(round > 0 || known.iter().all(|known| *known == 0));
    }
    let (key, n) = (bench.cache.nodes[0].key, bench.cache.nodes.len());
    assert_eq!(bench.cache.by_window.iter_hash(key).count(), PREFIX_COLLISIONS_MAX, "{n}");
    assert!(bench.cache.counters().refused > 0);
}

/// Goal: nothing is known under another tokenizer or salt, or from the middle on.
#[test]
fn scopes_share_nothing() {
    let mut bench = Bench::new(1 << 20);
    let text = words(1, 10_000);
    assert_eq!(bench.read(SCOPE, SHAPE, &text), 0);
    assert_eq!(bench.read(Scope { tokenizer: 2, ..SCOPE }, SHAPE, &text), 0);
    assert_eq!(bench.read(Scope { seed: 2, ..SCOPE }, SHAPE, &text), 0);
    assert_eq!(bench.read(SCOPE, SHAPE, part(&text, text.find(" x").unwrap() + 1..)), 0);
    assert!(bench.read(SCOPE, SHAPE, &text) > 8_000);
}

/// Goal: what comes behind a border may change the tokens before it.
#[test]
fn the_text_behind_a_chunk_counts() {
    let mut bench = Bench::new(1 << 20);
    let text = words(1, 3_000);
    bench.read(SCOPE, SHAPE, &text);
    let end = bench.cache.find(SCOPE, &text, SHAPE, &mut vec![], &mut vec![]).border();
    let (same, other) =
        (part(&text, 0..end.seen_to), format!("{}s{}", part(&text, 0..end.at), words(2, 10)));
    assert_eq!(bench.read(SCOPE, SHAPE, same), end.at);
    assert!(bench.read(SCOPE, SHAPE, &other) < end.at);
    assert!(bench.read(SCOPE, SHAPE, part(&text, 0..end.at)) < end.at);
}

/// Goal: what is used stays, whatever passes by; and its beginning as well.
#[test]
fn what_was_used_last_stays() {
    let mut bench = Bench::new(200_000);
    let (kept, left) = (words(1, 20_000), words(2, 20_000));
    bench.read(SCOPE, SHAPE, &left);
    for passing in 0..100 {
        let known = bench.read(SCOPE, SHAPE, &kept);
        assert_eq!(known > 17_000, passing > 0);
        bench.read(SCOPE, SHAPE, &words(passing + 10, 15_000));
    }
    assert_eq!(bench.read(SCOPE, SHAPE, &left), 0);
    assert!(bench.cache.counters().evicted > 1_000);
}

/// Goal: a text that is read while its beginning is forgotten is read right, and
/// another one in the same place is not taken for it.
#[test]
fn what_is_forgotten_meanwhile_is_not_continued() {
    let mut cache = PrefixCache::new(50_000, 1);
    let text = words(1, 6_000);
    let (tokens, borders) = (encode(&text, 1), borders(&text));
    let mut trail = cache.find(SCOPE, &text, SHAPE, &mut vec![], &mut vec![]);
    let near = |at: usize| *borders.iter().find(|border| border.at >= at).unwrap();
    cache.remember(&mut trail, &text, near(2_000), &tokens);
    assert_eq!(trail.border(), near(2_000));
    let mut bench = Bench { cache, random: Random::seeded(1) };
    for other in 2..20 {
        bench.read(SCOPE, SHAPE, &words(other, 10_000));
    }
    let before = bench.cache.counters();
    bench.cache.remember(&mut trail, &text, near(4_000), &tokens);
    assert_eq!((trail.border(), trail.is_open()), (near(2_000), false));
    bench.cache.remember_hashes(&trail, SHAPE, &[SequenceHash(1); 1_000]);
    bench.check();
    assert_eq!(bench.cache.counters(), before);
    assert_eq!(bench.read(SCOPE, SHAPE, &text), 0);
}

#[test]
fn a_cache_that_is_switched_off_forgets_all() {
    let mut bench = Bench::new(1 << 20);
    let text = words(1, 10_000);
    bench.read(SCOPE, SHAPE, &text);
    bench.cache.set_bytes_max(0);
    assert_eq!((bench.cache.bytes(), bench.cache.nodes.len()), (0, 0));
    assert_eq!(bench.read(SCOPE, SHAPE, &text), 0);
    assert_eq!(bench.read(SCOPE, SHAPE, &text), 0);
    bench.cache.set_bytes_max(1 << 20);
    assert_eq!(bench.read(SCOPE, SHAPE, &text), 0);
    assert!(bench.read(SCOPE, SHAPE, &text) > 8_000);
    assert_eq!(bench.cache.counters().lookups, 3);
}

/// Goal: a prompt that was being read when all was forgotten joins nothing that
/// came in its place.
#[test]
fn a_trail_of_before_fits_no_node_of_later() {
    let mut bench = Bench::new(1 << 20);
    let (begun, new) = (words(1, 10_000), words(2, 10_000));
    let old = [&begun, " ", &words(3, 5_000)].concat();
    bench.read(SCOPE, SHAPE, &begun);
    let (mut tokens, mut hashes) = (Vec::new(), Vec::new());
    let mut trail = bench.cache.find(SCOPE, &old, SHAPE, &mut tokens, &mut hashes);
    assert!(trail.border().at > 5_000);
    bench.cache.set_bytes_max(0);
    bench.cache.set_bytes_max(1 << 20);
    bench.read(SCOPE, SHAPE, &new);
    let nodes = bench.cache.nodes.len();
    let last = borders(&old).pop().unwrap();
    bench.cache.remember(&mut trail, &old, last, &encode(&old, SCOPE.tokenizer));
    assert!(!trail.is_open() && bench.cache.nodes.len() == nodes);
}

/// Goal: a text that is longer than all room is remembered as far as it goes.
#[test]
fn long_texts_fill_the_room_and_no_more() {
    let mut bench = Bench::new(100_000);
    let text = words(1, 500_000);
    bench.read(SCOPE, SHAPE, &words(2, 30_000));
    bench.read(SCOPE, SHAPE, &text);
    assert!(bench.cache.bytes() <= 100_000 && bench.cache.counters().refused > 0);
    assert!(bench.read(SCOPE, SHAPE, &text) > 20_000);
}

/// Goal: no chunk costs the others more than its due.
#[test]
fn chunks_that_are_too_large_are_not_remembered() {
    let mut bench = Bench::new(16 << 20);
    let text = format!("{} b c", "a".repeat(PREFIX_NODE_BYTES_MAX));
    assert_eq!((bench.read(SCOPE, SHAPE, &text), bench.read(SCOPE, SHAPE, &text)), (0, 0));
    assert_eq!(bench.cache.bytes(), 0);
    assert!(bench.cache.counters().refused > 0);
}

#[test]
fn comparing_is_comparing() {
    let text = words(3, 200);
    let bytes = text.as_bytes();
    for len in 0..150 {
        assert!(window::starts_with(bytes, &bytes[..len]));
        assert!(!window::starts_with(&bytes[..len], &bytes[..=len]));
        for at in 0..len {
            let mut other = bytes.to_vec();
            other[at] ^= 0x80;
            assert!(!window::starts_with(&other, &bytes[..len]), "{at} of {len}");
        }
    }
}
