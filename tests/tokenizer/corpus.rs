//! Texts to compare tokenizers on, from a seed.

/// A small generator of random numbers (`SplitMix64`), the same everywhere.
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number in `0..range`.
    pub fn below(&mut self, range: usize) -> usize {
        (self.next() % range as u64) as usize
    }

    fn one_of<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    fn char_in(&mut self, first: u32, last: u32) -> char {
        let span = (last - first + 1) as usize;
        char::from_u32(first + self.below(span) as u32).unwrap_or('\u{fffd}')
    }
}

const BITS: [&str; 20] = [
    "'s",
    "'LL",
    "'\u{17f}",
    " 123",
    "4567",
    "\u{2581}",
    "e\u{301}",
    "\u{301}",
    "\u{323}",
    "...",
    "\r\n",
    "\n\n",
    "   ",
    "\t",
    "\u{a0}",
    "\u{1100}\u{1161}",
    "\u{200d}",
    "://",
    "HTTPServer",
    "ß",
];

/// `count` texts of up to `length` draws, each from a few kinds of characters.
pub fn fuzz(seed: u64, count: usize, length: usize) -> Vec<String> {
    let mut random = Random(seed);
    (0..count)
        .map(|_| {
            let kinds: Vec<usize> = (0..1 + random.below(4)).map(|_| random.below(10)).collect();
            let mut text = String::new();
            for _ in 0..1 + random.below(length) {
                match *random.one_of(&kinds) {
                    0 => text.push(random.char_in(0x20, 0x7E)),
                    1 => text.push(random.char_in(u32::from(b'a'), u32::from(b'z'))),
                    2 => {
                        text.push(*random.one_of(&[' ', '\n', '\t', '\r', '\u{3000}', '\u{2028}']))
                    }
                    3 => text.push(random.char_in(0x4E00, 0x9FFF)),
                    4 => text.push(random.char_in(0xA0, 0x24FF)),
                    5 => text.push(random.char_in(0, 0x10_FFFF)),
                    6 => text.push(random.char_in(0x1F300, 0x1FAFF)),
                    7 => text.push(random.char_in(0x3040, 0x30FF)),
                    8 => text.push(' '),
                    _ => text.push_str(random.one_of::<&str>(&BITS)),
                }
            }
            text
        })
        .collect()
}

/// `count` texts of added tokens, whole and cut, and of what stands between.
pub fn added_fuzz(seed: u64, count: usize, tokens: &[String]) -> Vec<String> {
    let mut random = Random(seed);
    let between = [" ", "\n", "word", " Wort", "词", "e\u{301}", "12", "\u{2581}", "<", "<|", ""];
    (0..count)
        .map(|_| {
            let mut text = String::new();
            for _ in 0..1 + random.below(10) {
                let token = random.one_of(tokens);
                let cut = 1 + random.below(token.chars().count());
                match random.below(5) {
                    0 | 1 => text.push_str(token),
                    2 => text.extend(token.chars().take(cut)),
                    3 => text.extend(token.chars().skip(cut)),
                    _ => text.push_str(random.one_of::<&str>(&between)),
                }
            }
            text
        })
        .collect()
}

/// Long stretches without a border, near the length that is refused.
pub fn long_words(bytes: usize) -> Vec<String> {
    let mut random = Random(99);
    let letters: String = (0..bytes).map(|_| random.char_in(97, 122)).collect();
    let han: String = (0..bytes / 3).map(|_| random.char_in(0x4E00, 0x9FA5)).collect();
    let mixed: String = (0..bytes / 2).map(|_| random.char_in(0x20, 0x24F)).collect();
    let repeat = |unit: &str| unit.repeat(bytes / unit.len());
    vec![
        letters,
        han,
        mixed,
        repeat("a"),
        repeat(" "),
        repeat("\n"),
        repeat("ab"),
        repeat("=-"),
        repeat("é"),
        repeat("的"),
        repeat("\u{2581}"),
        repeat("\u{301}"),
        repeat("0"),
        repeat("😀"),
    ]
}
