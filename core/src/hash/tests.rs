//! Conformance vectors of Dynamo's router 1.6.1, obtained by running its crate
//! on the tokens 0, 1, ..., 127.

use super::*;

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

fn tokens() -> Vec<TokenId> {
    (0..128).collect()
}

fn plain(block_size: u32) -> BlockShape {
    BlockShape { block_size, eagle: false }
}

fn eagle(block_size: u32) -> BlockShape {
    BlockShape { block_size, eagle: true }
}

const PLAIN: Salt<'static> = Salt { lora: None, cache_salt: None };
const LORA: Salt<'static> = Salt { lora: Some("my-lora"), cache_salt: None };
const SALT: Salt<'static> = Salt { lora: None, cache_salt: Some("tenant-a") };
const BOTH: Salt<'static> = Salt { lora: Some("my-lora"), cache_salt: Some("tenant-a") };

/// Block hashes the slow and obvious way: one window at a time.
fn locals(shape: BlockShape, salt: Salt<'_>) -> Vec<u64> {
    let tokens = tokens();
    (0..shape.blocks(tokens.len()))
        .map(|block| {
            let start = block * shape.block_size as usize;
            block_hash(&tokens[start..start + shape.window()], salt.seed()).0
        })
        .collect()
}

fn sequences(shape: BlockShape, salt: Salt<'_>) -> Vec<u64> {
    let mut out = Vec::new();
    assert!(!sequence_hashes(&tokens(), shape, salt, &mut out));
    out.into_iter().map(|hash| hash.0).collect()
}

#[test]
fn seeds_follow_lora_and_salt() {
    assert_eq!(LORA.seed(), 0xb204_1cc4_5cbc_fedd);
    assert_eq!(SALT.seed(), 0x1b09_5b62_2954_4fb6);
    assert_eq!(BOTH.seed(), 0xcd0d_7826_8611_495a);
    assert_eq!(Salt { lora: Some(""), cache_salt: Some("") }.seed(), PLAIN.seed());
}

#[test]
fn plain_blocks_of_16() {
    assert_eq!(
        locals(plain(16), PLAIN),
        [
            15310707395893867146,
            15292316782987903195,
            5532946206955930018,
            14928757266181269122,
            16071864640778362908,
            6217069463196640829,
            914682815293275957,
            3448834029851753367,
        ]
    );
    assert_eq!(
        sequences(plain(16), PLAIN),
        [
            15310707395893867146,
            13769157705258532664,
            11879827756109914528,
            3888788807566526800,
            13934273443670478712,
            1640577095020996090,
            16183980258967299915,
            10811146638472622650,
        ]
    );
}

#[test]
fn plain_blocks_of_64() {
    assert_eq!(locals(plain(64), PLAIN), [3480597578098033343, 3318286205056455972]);
    assert_eq!(sequences(plain(64), PLAIN), [3480597578098033343, 2575318956255022795]);
}

#[test]
fn lora_blocks() {
    assert_eq!(locals(plain(64), LORA), [10083414349746181142, 2410927101610496931]);
    assert_eq!(sequences(plain(64), LORA), [10083414349746181142, 6467397007800490233]);
    assert_eq!(
        locals(plain(16), LORA),
        [
            7774427462321301335,
            11306793257002815283,
            5227710324928887427,
            16227747212725006563,
            5715751044780988549,
            7121685542162063829,
            8408118771434893842,
            12301306629426397373,
        ]
    );
    assert_eq!(
        sequences(plain(16), LORA),
        [
            7774427462321301335,
            13956809587245606139,
            7580671835638698099,
            11490194441755537719,
            8990733747352273872,
            14071605941846703427,
            3302128847426267331,
            8058057444651296020,
        ]
    );
}

#[test]
fn salted_blocks() {
    assert_eq!(locals(plain(64), SALT), [14430344014821386405, 10418984973072570953]);
    assert_eq!(sequences(plain(64), SALT), [14430344014821386405, 4697013937403288077]);
    assert_eq!(
        locals(plain(16), SALT),
        [
            2130915519417463704,
            14342547135021016991,
            11634673069974245442,
            3876172088424304685,
            8219183910018443319,
            16764866281037260166,
            8381590506858363292,
            10444302827117115602,
        ]
    );
    assert_eq!(
        sequences(plain(16), SALT),
        [
            2130915519417463704,
            13676355973429745432,
            5254782175510064001,
            6993337185294030064,
            16227877438633139579,
            17835432308647009437,
            15552092812875955672,
            6230859360575442357,
        ]
    );
}

#[test]
fn lora_and_salt_blocks() {
    assert_eq!(locals(plain(64), BOTH), [362533297564636366, 9845121031778139730]);
    assert_eq!(sequences(plain(64), BOTH), [362533297564636366, 3604936815748851560]);
}

#[test]
fn empty_lora_and_salt_are_absent() {
    let empty = Salt { lora: Some(""), cache_salt: Some("") };
    assert_eq!(sequences(plain(16), empty), sequences(plain(16), PLAIN));
}

#[test]
fn eagle_windows_overlap_by_one_token() {
    assert_eq!(
        locals(eagle(16), PLAIN),
        [
            11423441316381344367,
            6554946393898374776,
            6629656204900913084,
            6274175141200922274,
            11543948809580405827,
            635226262888708289,
            9248689252947973178,
        ]
    );
    assert_eq!(
        sequences(eagle(16), PLAIN),
        [
            11423441316381344367,
            14166973624120985939,
            5245424631710714814,
            12591916315549086943,
            17209160721715108466,
            15154531679881013605,
            10857731533762831730,
        ]
    );
    assert_eq!(locals(eagle(64), PLAIN), [17159017029960542977]);
}

#[test]
fn multimodal_objects_are_sorted_behind_the_tokens() {
    let tokens = tokens();
    let mut locals: Vec<BlockHash> =
        tokens.chunks_exact(16).map(|block| block_hash(block, BASE_SEED)).collect();
    locals[1] = block_hash_with_objects(&tokens[16..32], &[0x0123_4567_89ab_cdef], BASE_SEED);
    locals[3] = block_hash_with_objects(&tokens[48..64], &[5, 3], BASE_SEED);
    assert_eq!(locals[1].0, 14165866718600628756);
    assert_eq!(locals[3].0, 5839650589091604991);
    assert_eq!(block_hash_with_objects(&tokens[..16], &[], BASE_SEED), locals[0]);

    let mut parent = None;
    let mut chain = Vec::new();
    for local in locals {
        let hash = sequence_hash(parent, local);
        parent = Some(hash);
        chain.push(hash.0);
    }
    assert_eq!(
        chain[1..],
        [
            12240148525794481032,
            395074318841975671,
            13163283743154919763,
            14704799296564549107,
            16732822956820724315,
            16678185681388987174,
            17962213679327749127,
        ]
    );
}

#[test]
fn tails_are_dropped() {
    let mut out = Vec::new();
    sequence_hashes(&tokens()[..100], plain(16), PLAIN, &mut out);
    assert_eq!(out.iter().map(|hash| hash.0).collect::<Vec<_>>(), sequences(plain(16), PLAIN)[..6]);
    out.clear();
    sequence_hashes(&tokens()[..15], plain(16), PLAIN, &mut out);
    assert!(out.is_empty());
    sequence_hashes(&tokens(), plain(0), PLAIN, &mut out);
    assert!(out.is_empty());
}

#[test]
fn raw_xxh3_vector() {
    assert_eq!(xxh3_64_with_seed(b"test data", 1337), 13226331709069118873);
}

/// Goal: tokens are hashed as little-endian bytes, however memory is ordered.
#[test]
fn blocks_are_hashed_as_bytes() {
    let tokens: Vec<TokenId> = (0..1024).collect();
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    assert_eq!(block_hash(&tokens, 7).0, xxh3_64_with_seed(&bytes, 7));
}

#[test]
fn a_prompt_beyond_the_limit_is_cut_and_says_so() {
    let tokens: Vec<TokenId> = vec![7; PROMPT_BLOCKS_MAX + 1];
    let mut out = Vec::new();
    assert!(sequence_hashes(&tokens, plain(1), PLAIN, &mut out));
    assert_eq!(out.len(), PROMPT_BLOCKS_MAX);
}

/// Goal: a prompt hashed a part at a time has the hashes of the whole.
#[test]
fn parts_are_the_whole() {
    for shape in [plain(16), BlockShape { eagle: true, ..plain(4) }, plain(0), plain(1_000)] {
        let mut whole = Vec::new();
        sequence_hashes(&tokens(), shape, PLAIN, &mut whole);
        for blocks_max in [1, 2, 3, 1_000] {
            let mut parts = Vec::new();
            let mut calls = 1;
            while !next_sequence_hashes(&tokens(), shape, PLAIN.seed(), blocks_max, &mut parts) {
                assert_eq!(parts.len(), calls * blocks_max);
                calls += 1;
            }
            assert_eq!(parts, whole, "{shape:?}, {blocks_max} at a time");
        }
    }
}

#[test]
fn parts_end_at_the_limit() {
    let tokens: Vec<TokenId> = vec![7; PROMPT_BLOCKS_MAX + 1];
    let mut parts = Vec::new();
    let seed = PLAIN.seed();
    assert!(!next_sequence_hashes(&tokens, plain(1), seed, PROMPT_BLOCKS_MAX - 1, &mut parts));
    assert!(next_sequence_hashes(&tokens, plain(1), seed, usize::MAX, &mut parts));
    assert_eq!(parts.len(), PROMPT_BLOCKS_MAX);
}
