//! Report: checks, their figures, and the last line.

use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;

/// Counts checks and prints each as it is made.
#[derive(Debug, Default)]
pub struct Report {
    passed: u32,
    failed: u32,
}

impl Report {
    /// Counts a check and prints it with its figures.
    pub fn check(&mut self, name: &str, holds: bool, figures: impl Display) {
        let word = if holds {
            self.passed += 1;
            "ok"
        } else {
            self.failed += 1;
            "FAILED"
        };
        line(format_args!("{word:6} {name}: {figures}"));
    }

    /// Counts a failure that is none of a check's, such as a stack that does
    /// not start.
    pub fn failure(&mut self, name: &str, error: impl Display) {
        self.check(name, false, error);
    }

    /// Whether a check has failed so far.
    #[must_use]
    pub fn has_failures(&self) -> bool {
        self.failed > 0
    }

    /// Checks that have failed so far.
    #[must_use]
    pub fn failed(&self) -> u32 {
        self.failed
    }

    /// Prints the last line, exactly `N passed, N failed`.
    #[must_use]
    pub fn finish(self) -> ExitCode {
        line(format_args!("{} passed, {} failed", self.passed, self.failed));
        // A run without checks has shown nothing.
        if self.failed == 0 && self.passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// Prints a line. With standard output closed there is nobody to tell.
pub fn line(text: impl Display) {
    let _told = writeln!(std::io::stdout().lock(), "{text}");
}

/// The `p`th percentile of some numbers (0 of none), sorting them.
#[must_use]
pub fn percentile(numbers: &mut [u64], p: usize) -> u64 {
    numbers.sort_unstable();
    let index = numbers.len().saturating_sub(1) * p.min(100) / 100;
    numbers.get(index).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_the_sorted_list() {
        let mut numbers: Vec<u64> = (0..=100).rev().collect();
        assert_eq!(percentile(&mut numbers, 50), 50);
        assert_eq!(percentile(&mut numbers, 99), 99);
        assert_eq!(percentile(&mut numbers, 100), 100);
        assert_eq!(percentile(&mut [], 50), 0);
    }
}
