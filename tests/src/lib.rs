//! Support library of the tests.
