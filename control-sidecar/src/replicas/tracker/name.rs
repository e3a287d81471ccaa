//! Name: what a booking of ours is called among routers.

use warmpath_core::load::BookingId;

/// The name of a gateway's booking for other routers: a UUID by its form, which
/// is what Dynamo takes for a request's name.
#[must_use]
pub(super) fn request_name(gateway: u64, booking: BookingId) -> String {
    let (high, low) = (gateway, booking.0);
    format!(
        "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
        high >> 32,
        high >> 16 & 0xffff,
        high & 0xffff,
        low >> 48,
        low & 0xffff_ffff_ffff
    )
}

/// What [`request_name`] was made of.
pub(super) fn named(request: &str) -> Option<(u64, BookingId)> {
    let parts: Vec<&str> = request.split('-').collect();
    let lens: Vec<usize> = parts.iter().map(|part| part.len()).collect();
    if lens != [8, 4, 4, 4, 12] || !request.is_ascii() {
        return None;
    }
    let number = u128::from_str_radix(&parts.concat(), 16).ok()?;
    let low = number & u128::from(u64::MAX);
    Some((u64::try_from(number >> 64).ok()?, BookingId(u64::try_from(low).ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GATEWAY: u64 = 0xabcd_ef01_2345_6789;

    #[test]
    fn names_are_uuids_and_can_be_read_back() {
        let name = request_name(GATEWAY, BookingId(0x1_0000_002a));
        assert_eq!(name, "abcdef01-2345-6789-0000-00010000002a");
        assert_eq!(named(&name), Some((GATEWAY, BookingId(0x1_0000_002a))));
        for other in
            ["", "r1", "abcdef01-2345-6789-0000-00010000002g", "ä-2345-6789-0000-00010000002a"]
        {
            assert_eq!(named(other), None, "{other}");
        }
    }
}
