//! The time that a template prints, given from outside.

use minijinja::{Error, ErrorKind};
use std::fmt::Write;

/// A moment on a wall clock.
///
/// Templates that print the date follow the clock and the zone of the engine's
/// machine; around midnight a gateway can disagree with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WallClock {
    /// Seconds since 1970-01-01T00:00:00Z, without leap seconds.
    pub unix_seconds: i64,
    /// What the zone adds to UTC, in seconds.
    pub utc_offset_seconds: i32,
}

/// A moment, taken apart.
struct Civil {
    year: i64,
    /// 1 to 12.
    month: u8,
    /// 1 to 31.
    day: u8,
    /// 1 to 366.
    day_of_year: i64,
    /// 0 to 6, from Sunday.
    weekday: u8,
    hour: i64,
    minute: i64,
    second: i64,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

const WEEKDAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

impl Civil {
    fn of(now: WallClock) -> Civil {
        let seconds = now.unix_seconds.saturating_add(i64::from(now.utc_offset_seconds));
        let days = seconds.div_euclid(86_400);
        let second_of_day = seconds.rem_euclid(86_400);
        // Howard Hinnant's `civil_from_days`: years start in March, so that the
        // leap day is the last of its year; 400 years have 146,097 days.
        let shifted = days.saturating_add(719_468);
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_march_year =
            day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_march_year + 2) / 153;
        let day = day_of_march_year - (153 * march_month + 2) / 5 + 1;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        let leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
        let day_of_year = if month > 2 {
            day_of_march_year + 60 + i64::from(leap)
        } else {
            day_of_march_year - 305
        };
        Civil {
            year,
            month: small(month),
            day: small(day),
            day_of_year,
            weekday: small((days + 4).rem_euclid(7)),
            hour: second_of_day / 3_600,
            minute: second_of_day / 60 % 60,
            second: second_of_day % 60,
        }
    }
}

fn small(number: i64) -> u8 {
    u8::try_from(number).unwrap_or_default()
}

fn name(names: &[&'static str], index: u8) -> &'static str {
    names.get(usize::from(index)).copied().unwrap_or_default()
}

/// Python's `strftime` in the C locale, as glibc does it.
///
/// # Errors
///
/// A directive that is not known here.
pub(super) fn strftime(now: WallClock, format: &str) -> Result<String, Error> {
    let civil = Civil::of(now);
    let mut out = String::new();
    let mut rest = format;
    while let Some((before, after)) = rest.split_once('%') {
        out.push_str(before);
        let (unpadded, after) = match after.strip_prefix('-') {
            Some(after) => (true, after),
            None => (false, after),
        };
        let mut characters = after.chars();
        let directive = characters.next();
        rest = characters.as_str();
        let mut field = String::new();
        write_directive(&civil, directive, &mut field)?;
        out.push_str(if unpadded && field.len() > 1 {
            let trimmed = field.trim_start_matches(['0', ' ']);
            if trimmed.is_empty() { "0" } else { trimmed }
        } else {
            &field
        });
    }
    out.push_str(rest);
    Ok(out)
}

fn write_directive(civil: &Civil, directive: Option<char>, out: &mut String) -> Result<(), Error> {
    let hour_of_twelve = if civil.hour % 12 == 0 { 12 } else { civil.hour % 12 };
    let month = name(&MONTHS, civil.month.saturating_sub(1));
    let weekday = name(&WEEKDAYS, civil.weekday);
    let short = |name: &'static str| name.get(..3).unwrap_or_default();
    let (year, day, hour, minute, second) =
        (civil.year, civil.day, civil.hour, civil.minute, civil.second);
    // Writing to a string cannot fail.
    let _ = match directive {
        Some('Y') => write!(out, "{year}"),
        Some('y') => write!(out, "{:02}", year.rem_euclid(100)),
        Some('C') => write!(out, "{:02}", year.div_euclid(100)),
        Some('m') => write!(out, "{:02}", civil.month),
        Some('d') => write!(out, "{day:02}"),
        Some('e') => write!(out, "{day:2}"),
        Some('j') => write!(out, "{:03}", civil.day_of_year),
        Some('B') => out.write_str(month),
        Some('b' | 'h') => out.write_str(short(month)),
        Some('A') => out.write_str(weekday),
        Some('a') => out.write_str(short(weekday)),
        Some('w') => write!(out, "{}", civil.weekday),
        Some('u') => write!(out, "{}", if civil.weekday == 0 { 7 } else { civil.weekday }),
        Some('H') => write!(out, "{hour:02}"),
        Some('I') => write!(out, "{hour_of_twelve:02}"),
        Some('M') => write!(out, "{minute:02}"),
        Some('S') => write!(out, "{second:02}"),
        Some('f') => out.write_str("000000"),
        Some('p') => out.write_str(if hour < 12 { "AM" } else { "PM" }),
        Some('D' | 'x') => {
            write!(out, "{:02}/{day:02}/{:02}", civil.month, year.rem_euclid(100))
        }
        Some('F') => write!(out, "{year}-{:02}-{day:02}", civil.month),
        Some('T' | 'X') => write!(out, "{hour:02}:{minute:02}:{second:02}"),
        Some('R') => write!(out, "{hour:02}:{minute:02}"),
        Some('c') => write!(
            out,
            "{} {} {day:2} {hour:02}:{minute:02}:{second:02} {year}",
            short(weekday),
            short(month)
        ),
        // Python's `datetime.now()` knows no zone, so these print nothing.
        Some('z' | 'Z') => Ok(()),
        Some('n') => out.write_str("\n"),
        Some('t') => out.write_str("\t"),
        Some('%') => out.write_str("%"),
        _ => {
            return Err(Error::new(ErrorKind::InvalidOperation, "unknown strftime directive"));
        }
    };
    Ok(())
}
