//! Bench: speed, measured beside a baseline, with every answer checked.
//!
//! Each benchmark program measures one part and writes its rows; the table and
//! `target/bench/summary.json` are made of all parts (`scripts/bench.py`).

pub mod corpus;
pub mod feed;
pub mod gateway;
pub mod load;
pub mod neighbour;
pub mod rows;
