//! The patterns of the pre-tokenizer as a small automaton; see
//! `tokenize::split` for its form.
//!
//! `regex-automata` determinizes the patterns; its automaton is walked, states
//! that cannot be told apart are joined, and what is left is numbered anew.

use std::collections::VecDeque;

use super::map::HashMap;
use regex_automata::dfa::{Automaton, StartKind, dense};
use regex_automata::nfa::thompson::{self, WhichCaptures};
use regex_automata::util::primitives::StateID;
use regex_automata::{Anchored, MatchKind};
use regex_syntax::hir::Hir;

use super::pattern::Pattern;
use super::write::Writer;
use super::{CompileError, unsupported};
use crate::tokenize::file::Section;
use crate::tokenize::split::MATCH_WHOLE;

/// Bytes and the end of text.
const COLUMNS: usize = 257;

/// Most memory for determinizing, in bytes.
const DFA_BYTES_MAX: usize = 256 << 20;

/// A state while the automaton is built: where each byte leads, and the kind of
/// match it reports.
struct State {
    next: Vec<u32>,
    matched: Option<u8>,
}

/// Compiles the patterns into sections.
pub(super) fn write(patterns: &[Pattern], writer: &mut Writer) -> Result<(), CompileError> {
    let states = walk(patterns)?;
    let (columns, class_of) = columns(&states);
    let parts = join(&states, &columns);
    let (order, number) = number(&states, &parts);

    let mut transitions = Vec::new();
    let mut matches = Vec::new();
    for &state in &order {
        let Some(state) = states.get(state) else { continue };
        matches.extend(state.matched);
        for &column in &columns {
            let next = state.next.get(column).copied().unwrap_or(0) as usize;
            let next = parts.get(next).and_then(|&part| number.get(part as usize));
            let Some(Ok(next)) = next.map(|&next| u16::try_from(next)) else {
                return Err(CompileError::TooLarge("states of the pre_tokenizer pattern"));
            };
            transitions.push(next);
        }
    }
    writer.u16s(Section::DfaClasses, &class_of);
    writer.u16s(Section::DfaTransitions, &transitions);
    writer.bytes(Section::DfaMatches, matches);
    Ok(())
}

/// Whether there is no text that `hir` matches.
pub(super) fn matches_nothing(hir: &Hir) -> Result<bool, CompileError> {
    let states = walk(&[Pattern { hir: hir.clone(), kind: MATCH_WHOLE }])?;
    Ok(states.iter().all(|state| state.matched.is_none()))
}

/// All states that can be reached: 0 is dead, 1 the start.
fn walk(patterns: &[Pattern]) -> Result<Vec<State>, CompileError> {
    let dfa = determinize(patterns)?;
    let Some(start) = dfa.universal_start_state(Anchored::Yes) else {
        return unsupported("pre_tokenizer pattern: look-behind");
    };
    let mut ids: HashMap<StateID, u32> = HashMap::default();
    let mut states = vec![State { next: vec![0; COLUMNS], matched: None }];
    let mut queue = VecDeque::from([start]);
    ids.insert(start, 1);
    let mut known = 2;
    while let Some(id) = queue.pop_front() {
        let mut state = State { next: Vec::with_capacity(COLUMNS), matched: None };
        if dfa.is_match_state(id) {
            let pattern = patterns.get(dfa.match_pattern(id, 0).as_usize());
            state.matched = Some(pattern.map_or(MATCH_WHOLE, |pattern| pattern.kind));
        }
        let bytes = (0..=u8::MAX).map(|byte| dfa.next_state(id, byte));
        for next in bytes.chain([dfa.next_eoi_state(id)]) {
            if dfa.is_quit_state(next) {
                return unsupported("pre_tokenizer pattern: not decidable byte by byte");
            }
            if dfa.is_dead_state(next) {
                state.next.push(0);
                continue;
            }
            state.next.push(*ids.entry(next).or_insert_with(|| {
                queue.push_back(next);
                known += 1;
                known - 1
            }));
        }
        states.push(state);
    }
    Ok(states)
}

fn determinize(patterns: &[Pattern]) -> Result<dense::DFA<Vec<u32>>, CompileError> {
    let too_large = |_| CompileError::TooLarge("automaton of the pre_tokenizer pattern");
    let hirs: Vec<_> = patterns.iter().map(|pattern| &pattern.hir).collect();
    let nfa = thompson::Compiler::new()
        .configure(thompson::Config::new().which_captures(WhichCaptures::None))
        .build_many_from_hir(&hirs)
        .map_err(|_| CompileError::TooLarge("pre_tokenizer pattern"))?;
    dense::Builder::new()
        .configure(
            dense::Config::new()
                .match_kind(MatchKind::LeftmostFirst)
                .start_kind(StartKind::Anchored)
                .accelerate(false)
                .dfa_size_limit(Some(DFA_BYTES_MAX))
                .determinize_size_limit(Some(DFA_BYTES_MAX)),
        )
        .build_from_nfa(&nfa)
        .map_err(too_large)
}

/// One column for each class of bytes that no state tells apart, the end last;
/// and the class of every byte.
fn columns(states: &[State]) -> (Vec<usize>, Vec<u16>) {
    let mut seen: HashMap<Vec<u32>, u16> = HashMap::default();
    let (mut columns, mut class_of) = (Vec::new(), Vec::new());
    for byte in 0..COLUMNS - 1 {
        let column: Vec<u32> =
            states.iter().map(|state| state.next.get(byte).copied().unwrap_or(0)).collect();
        // At most 256 classes.
        let class = u16::try_from(columns.len()).unwrap_or(0);
        class_of.push(*seen.entry(column).or_insert_with(|| {
            columns.push(byte);
            class
        }));
    }
    columns.push(COLUMNS - 1);
    (columns, class_of)
}

/// Joins states that cannot be told apart (Moore's algorithm): the part of each
/// state. Starts from the kinds of match and refines until nothing changes.
fn join(states: &[State], columns: &[usize]) -> Vec<u32> {
    let mut parts: Vec<u32> =
        states.iter().map(|state| state.matched.map_or(0, |kind| u32::from(kind) + 1)).collect();
    let mut count = 0;
    loop {
        let mut seen: HashMap<Vec<u32>, u32> = HashMap::default();
        let mut refined = Vec::with_capacity(parts.len());
        for (state, &part) in states.iter().zip(&parts) {
            let next = |&column: &usize| {
                let next = state.next.get(column).copied().unwrap_or(0);
                parts.get(next as usize).copied().unwrap_or(0)
            };
            let key = std::iter::once(part).chain(columns.iter().map(next)).collect();
            let fresh = u32::try_from(seen.len()).unwrap_or(u32::MAX);
            refined.push(*seen.entry(key).or_insert(fresh));
        }
        parts = refined;
        if seen.len() == count {
            return parts;
        }
        count = seen.len();
    }
}

/// A state of each part in the order of the file: dead, start, those that
/// report a match, the others; and the number of each part.
fn number(states: &[State], parts: &[u32]) -> (Vec<usize>, Vec<usize>) {
    let mut first: Vec<usize> = Vec::new();
    let mut known = vec![false; parts.len()];
    for (state, &part) in parts.iter().enumerate() {
        if let Some(known @ false) = known.get_mut(part as usize) {
            *known = true;
            first.push(state);
        }
    }
    let group = |&state: &usize| match state {
        0 | 1 => state,
        _ if states.get(state).is_some_and(|state| state.matched.is_some()) => 2,
        _ => 3,
    };
    first.sort_by_key(group);
    let mut number = vec![0; parts.len()];
    for (index, &state) in first.iter().enumerate() {
        if let Some(to) = parts.get(state).and_then(|&part| number.get_mut(part as usize)) {
            *to = index;
        }
    }
    (first, number)
}
