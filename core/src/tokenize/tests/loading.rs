//! Loading is total: any bytes give an error or a tokenizer whose encoding is
//! bounded. Files are damaged with and without their checksum made right again,
//! so that the checks behind it are reached.

#[cfg(target_arch = "wasm32")]
use wasm_bindgen_test::wasm_bindgen_test as test;

use super::*;

/// Makes length and checksum right again.
fn seal(file: &mut [u8]) {
    let len = (file.len() as u64).to_le_bytes();
    if let Some(to) = file.get_mut(16..24) {
        to.copy_from_slice(&len);
    }
    if file.len() >= 32 {
        let checksum = xxhash_rust::xxh3::xxh3_64(&file[32..]).to_le_bytes();
        file[24..32].copy_from_slice(&checksum);
    }
}

/// Bytes that one byte becomes when a text is normalized: NFC takes some letters
/// of three bytes apart into two, and a space becomes a sign of three.
const NORMALIZED_BYTES_MAX: usize = 3;

/// Loads and, if that succeeds, encodes; whether it loaded.
fn survives(file: &[u8], texts: &[&str]) -> bool {
    let Ok(mut tokenizer) = Tokenizer::load(AlignedBytes::from_slice(file)) else { return false };
    for text in texts {
        let mut ids = Vec::new();
        if tokenizer.encode(text, &mut ids).is_ok() {
            assert!(ids.len() <= text.len() * NORMALIZED_BYTES_MAX, "more tokens than bytes");
        }
    }
    true
}

const TEXTS: [&str; 4] = [
    "",
    "It's 12,345 requests; we'll see.\n\n  def route(request):\n\treturn best[1] \u{2581}\u{2581} ",
    "如果队列太长😀e\u{301}ก่อน <|im_start|><bos>\n\n\n\u{10ffff}",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
];

/// Goal: every byte of header and section table may be anything.
/// Method: each one changed in three ways, the checksum made right.
#[test]
fn any_header_is_survived() {
    for golden in [golden("qwen3"), golden("gemma3")] {
        let file = golden.file();
        assert!(survives(&file, &TEXTS));
        let header = file::TABLE_AT + file::SECTIONS * file::TABLE_ENTRY;
        let mut refused = 0;
        for at in 0..header {
            for flip in [0x01, 0x80, 0xFF] {
                let mut damaged = file.clone();
                damaged[at] ^= flip;
                assert!(!survives(&damaged, &[]), "damage at {at} goes unnoticed");
                seal(&mut damaged);
                refused += usize::from(!survives(&damaged, &TEXTS));
            }
        }
        assert!(refused > header, "most damage of the header is found without the checksum");
    }
}

/// Goal: a file cut anywhere is refused.
#[test]
fn cut_files_are_refused() {
    let file = golden("gpt2").file();
    let step = file.len() / 400;
    for len in (0..400).chain((0..file.len()).step_by(step)).chain(file.len() - 9..file.len()) {
        assert!(!survives(&file[..len], &[]), "cut to {len}");
    }
}

/// Goal: every reason to refuse a file is told apart.
#[test]
fn refusals_are_told_apart() {
    let file = golden("gpt2").file();
    let error = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut damaged = file.clone();
        change(&mut damaged);
        Tokenizer::load(AlignedBytes::from_slice(&damaged)).err()
    };
    assert_eq!(error(&|_| {}), None);
    assert_eq!(error(&Vec::clear), Some(LoadError::NotATokenizer));
    assert_eq!(error(&|file| file[0] = b'w'), Some(LoadError::NotATokenizer));
    assert_eq!(error(&|file| file.push(0)), Some(LoadError::NotATokenizer));
    assert_eq!(error(&|file| file[8] = 9), Some(LoadError::OtherVersion));
    assert_eq!(error(&|file| *file.last_mut().unwrap() ^= 1), Some(LoadError::Checksum));
    let malformed = error(&|file| {
        file[12] = 77;
        seal(file);
    });
    assert_eq!(malformed, Some(LoadError::Malformed));
    let oversized = AlignedBytes::zeroed(crate::limits::TOKENIZER_FILE_BYTES_MAX + 1);
    assert_eq!(Tokenizer::load(oversized).err(), Some(LoadError::TooLong));
}

#[cfg(not(target_arch = "wasm32"))]
mod random {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    static FILES: LazyLock<Vec<Vec<u8>>> =
        LazyLock::new(|| COMPILED.iter().map(Golden::file).collect());

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        /// Goal: random damage anywhere, sealed or not, is survived.
        #[test]
        fn damage_is_survived(
            which in 0..COMPILED.len(),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..40),
            text in "\\PC{0,200}",
            sealed in any::<bool>(),
        ) {
            let mut file = FILES[which].clone();
            for (at, byte) in damage {
                let at = at.index(file.len());
                file[at] = byte;
            }
            if sealed {
                seal(&mut file);
            }
            survives(&file, &[&text, TEXTS[1], TEXTS[2], TEXTS[3]]);
        }

        /// Goal: whole sections of nonsense are survived: a section is pointed
        /// anywhere, with any length.
        #[test]
        fn moved_sections_are_survived(
            which in 0..COMPILED.len(),
            moves in prop::collection::vec((0..file::SECTIONS, any::<u32>(), any::<u32>()), 1..6),
            inside in any::<bool>(),
        ) {
            let mut file = FILES[which].clone();
            let len = u32::try_from(file.len()).unwrap();
            for (section, start, bytes) in moves {
                let (start, bytes) = if inside {
                    let start = start % len / 8 * 8;
                    (start, bytes % (len - start + 1) / 8 * 8)
                } else {
                    (start, bytes)
                };
                let at = file::TABLE_AT + section * file::TABLE_ENTRY;
                file[at..at + 4].copy_from_slice(&start.to_le_bytes());
                file[at + 4..at + 8].copy_from_slice(&bytes.to_le_bytes());
            }
            seal(&mut file);
            survives(&file, &TEXTS);
        }

        /// Goal: bytes that never were a file are refused.
        #[test]
        fn nonsense_is_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..600), magic in any::<bool>()) {
            if magic && bytes.len() >= 12 {
                bytes[..8].copy_from_slice(&file::MAGIC);
                bytes[8..12].copy_from_slice(&file::VERSION.to_le_bytes());
            }
            seal(&mut bytes);
            prop_assert!(!survives(&bytes, &TEXTS));
        }

        /// Goal: slices of any text at any budget add up.
        #[test]
        fn random_slices_add_up(
            which in 0..COMPILED.len(),
            text in "(\\PC|[ \n\t]|<\\|im_start\\|>|e\u{301}|[a-z]{1,9}){0,120}",
            budget in 0_usize..50,
        ) {
            let mut tokenizer = Tokenizer::load(AlignedBytes::from_slice(&FILES[which])).unwrap();
            let (mut progress, mut ids) = (Progress::default(), Vec::new());
            while !tokenizer.encode_slice(&text, &mut progress, budget, &mut ids).unwrap() {}
            prop_assert_eq!(ids, encode(&mut tokenizer, &text));
        }

        /// Goal: normalizing in chunks is normalizing the whole.
        #[test]
        fn chunks_of_normal_text_add_up(
            parts in prop::collection::vec("(\\PC{1,3}|e\u{301}|\u{1100}\u{1161}\u{11a8}|[\u{300}-\u{36f}]{1,4}|漢|ab ){1,30}", 1..200),
        ) {
            use unicode_normalization_alignments::UnicodeNormalization;
            let text = parts.concat().repeat(3);
            let (mut at, mut normal) = (0, String::new());
            while at < text.len() {
                let end = normalize::chunk_end(&text, at).unwrap();
                let chunk = text.get(at..end).unwrap();
                if normalize::is_normal(chunk) {
                    normal.push_str(chunk);
                } else {
                    normalize::append_normal(chunk, &mut normal);
                }
                at = end;
            }
            let whole: String = text.nfc().map(|(character, _)| character).collect();
            prop_assert_eq!(normal, whole);
        }
    }
}
