//! Numbers in decimal: single ones, and lists of tens of thousands of token ids.

use crate::ids::TokenId;

/// The two digits of every number below 100.
const DIGIT_PAIRS: [[u8; 2]; 100] = {
    let mut pairs = [[b'0'; 2]; 100];
    let mut digits = (0, 0);
    let mut rest: &mut [[u8; 2]] = &mut pairs;
    while let [pair, tail @ ..] = rest {
        *pair = [b'0' + digits.0, b'0' + digits.1];
        digits = if digits.1 == 9 { (digits.0 + 1, 0) } else { (digits.0, digits.1 + 1) };
        rest = tail;
    }
    pairs
};

/// Writes a number, two digits at a time.
pub(super) fn write(mut number: u64, out: &mut Vec<u8>) {
    // The largest has twenty digits; they are produced from the end.
    let mut pairs = [[b'0'; 2]; 10];
    let mut used = 0;
    for pair in pairs.iter_mut().rev() {
        let two_digits = usize::try_from(number % 100).unwrap_or_default();
        *pair = DIGIT_PAIRS.get(two_digits).copied().unwrap_or_default();
        used += 2;
        number /= 100;
        if number == 0 {
            break;
        }
    }
    let digits = pairs.as_flattened();
    let digits = digits.get(digits.len() - used..).unwrap_or_default();
    out.extend_from_slice(match digits {
        [b'0', rest @ ..] => rest,
        all => all,
    });
}

/// Writes numbers with commas between them.
pub(super) fn write_list(ids: &[TokenId], out: &mut Vec<u8>) {
    /// Ids that are put together before they are copied.
    const BATCH: usize = 128;
    let start = out.len();
    for batch in ids.chunks(BATCH) {
        let mut buffer = [0; BATCH * 8];
        let mut filled = 0;
        for &id in batch {
            if id < SHORT_END {
                let (bytes, len) = short_with_comma(id);
                let free = buffer.get_mut(filled..).and_then(|free| free.first_chunk_mut());
                if let Some(free) = free {
                    *free = bytes;
                    filled += len;
                }
            } else {
                out.extend_from_slice(buffer.get(..filled).unwrap_or_default());
                filled = 0;
                write(u64::from(id), out);
                out.push(b',');
            }
        }
        out.extend_from_slice(buffer.get(..filled).unwrap_or_default());
    }
    if out.len() > start {
        out.pop();
    }
}

/// Numbers from here on have more than seven digits. The ids of a tokenizer that
/// is loaded are below.
const SHORT_END: u32 = 10_000_000;

/// The digits of a number below [`SHORT_END`], a comma behind them, and how many
/// bytes that is. All eight digits are computed at once: the number is halved
/// into groups of four, two and one digits in the lanes of one word.
#[inline]
fn short_with_comma(number: u32) -> ([u8; 8], usize) {
    const LOW_7_OF_32: u64 = 0x0000_007f_0000_007f;
    const LOW_4_OF_16: u64 = 0x000f_000f_000f_000f;
    const ZEROS: u64 = 0x3030_3030_3030_3030;
    let fours = u64::from(number / 10_000) | (u64::from(number % 10_000) << 32);
    // Multiplying and shifting divides by 100, exactly below 10 000, and by 10
    // below 100.
    let upper = (fours.wrapping_mul(10_486) >> 20) & LOW_7_OF_32;
    let twos = upper | ((fours - upper * 100) << 16);
    let upper = (twos.wrapping_mul(103) >> 10) & LOW_4_OF_16;
    let ones = upper | ((twos - upper * 10) << 8);
    // The first digit is the lowest byte. Zero has one digit, too.
    let leading = ones.trailing_zeros().min(56) / 8;
    let len = 8 - leading;
    let digits = (ones | ZEROS) >> (leading * 8);
    let comma = u64::from(b',').checked_shl(len * 8).unwrap_or(0);
    ((digits | comma).to_le_bytes(), len as usize + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_arch = "wasm32")]
    use wasm_bindgen_test::wasm_bindgen_test as test;

    fn list(ids: &[TokenId]) -> String {
        let mut out = b"[".to_vec();
        write_list(ids, &mut out);
        String::from_utf8(out).unwrap()
    }

    /// Goal: every id is written as `to_string` writes it, in every place of a
    /// batch.
    #[test]
    fn lists_are_those_of_the_standard_library() {
        let powers = (0..10).map(|digits| 10_u32.pow(digits));
        let mut ids: Vec<u32> = powers.flat_map(|power| [power - 1, power, power + 1]).collect();
        ids.extend([u32::MAX, SHORT_END - 1, SHORT_END]);
        ids.extend(0..20_000);
        let steps = if cfg!(target_arch = "wasm32") { 100_003 } else { 97 };
        ids.extend((0..SHORT_END).step_by(steps));
        let expected: Vec<String> = ids.iter().map(u32::to_string).collect();
        assert_eq!(list(&ids), format!("[{}", expected.join(",")));
    }

    #[test]
    fn nothing_is_written_for_no_ids() {
        assert_eq!(list(&[]), "[");
    }
}
