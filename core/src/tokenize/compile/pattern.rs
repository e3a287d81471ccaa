//! The split patterns of a `tokenizer.json`, brought into a form without
//! look-around.
//!
//! # What is done
//!
//! - The look-ahead that all these patterns end with, the alternative
//!   `\s+(?!\S)`, becomes `\s+\z` and `\s+\s` with the last character given
//!   back: a run of white space up to the end, or all but its last character.
//! - A sequence of splits becomes one, if all but the last are runs of one
//!   class (`\p{N}{1,3}`, `[...]+`). Such a run is a text of its own to the
//!   last split, and so is what lies between runs. So the characters of runs
//!   are taken out of all classes of the last pattern, where they follow is an
//!   end of text to it, and the pattern stands once more for each run, with
//!   only the characters of that run in its classes.
//!
//! # What is refused
//!
//! Whatever Oniguruma and `regex-syntax` may take differently: other
//! look-around, anchors, `\w`, `\b`, `.`, class operators, possessive
//! quantifiers, case-insensitive groups other than the English contractions,
//! scripts and named properties. The Unicode versions of both are 16, so the
//! general categories are the same.

use regex_syntax::ast::{self, Ast};
use regex_syntax::hir::{Class, ClassUnicode, ClassUnicodeRange, Hir, HirKind, Repetition};
use serde_json::Value;

use super::{CompileError, type_of, unsupported};
use crate::tokenize::split::{MATCH_DROPS_LAST, MATCH_GAP, MATCH_WHOLE};

/// The pattern of `ByteLevel` with `use_regex`.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// The one alternative with look-ahead.
const LOOK_AHEAD: &str = r"\s+(?!\S)";

/// Case-insensitive groups whose folding is the same in both engines: none of
/// their letters stands next to another that it forms a ligature with.
const CASELESS: [&str; 2] = ["(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?i:[sdmt]|ll|ve|re)"];

/// Text that means something else to one of the engines.
const AMBIGUOUS: [&str; 5] = ["&&", "--", "~~", "[[", "[^["];

/// General categories, long enough a list for the patterns in use.
const CATEGORIES: &str = " L Lu Ll Lt Lm Lo M Mn Mc Me N Nd Nl No P S Z ";

/// A pre-tokenizer, taken apart.
pub(super) struct PreTokenizer {
    /// Patterns of `Split`, each isolating its matches, in order.
    pub(super) stages: Vec<String>,
    /// Strings of `Split`, of any behaviour.
    pub(super) literals: Vec<String>,
    /// Whether text becomes bytes in the end.
    pub(super) byte_level: bool,
}

/// One pattern of the automaton; of several that match, the first wins.
pub(super) struct Pattern {
    pub(super) hir: Hir,
    /// What a match of it means, as in `tokenize::split`.
    pub(super) kind: u8,
}

/// A stage before the last: runs of one class.
struct Run {
    hir: Hir,
    class: ClassUnicode,
    /// Runs end only where the class does.
    unbounded: bool,
}

/// Reads the `pre_tokenizer` of a file.
pub(super) fn read(value: &Value) -> Result<PreTokenizer, CompileError> {
    let mut read = PreTokenizer { stages: Vec::new(), literals: Vec::new(), byte_level: false };
    read_into(value, &mut read)?;
    Ok(read)
}

fn read_into(value: &Value, read: &mut PreTokenizer) -> Result<(), CompileError> {
    if value.is_null() {
        return Ok(());
    }
    if read.byte_level {
        return unsupported("pre_tokenizer behind ByteLevel");
    }
    match type_of(value) {
        "Sequence" => {
            let parts = value.get("pretokenizers").and_then(Value::as_array);
            for part in parts.map(Vec::as_slice).unwrap_or_default() {
                read_into(part, read)?;
            }
            Ok(())
        }
        "Split" => read_split(value, read),
        "ByteLevel" => {
            if value.get("add_prefix_space") != Some(&Value::Bool(false)) {
                return unsupported("pre_tokenizer ByteLevel with add_prefix_space");
            }
            if value.get("use_regex") != Some(&Value::Bool(false)) {
                read.stages.push(GPT2.to_owned());
            }
            read.byte_level = true;
            Ok(())
        }
        other => unsupported(format!("pre_tokenizer {other}")),
    }
}

fn read_split(value: &Value, read: &mut PreTokenizer) -> Result<(), CompileError> {
    if let Some(literal) = value.pointer("/pattern/String").and_then(Value::as_str) {
        read.literals.push(literal.to_owned());
        return Ok(());
    }
    let Some(regex) = value.pointer("/pattern/Regex").and_then(Value::as_str) else {
        return unsupported("pre_tokenizer Split without a pattern");
    };
    let isolated = value.get("behavior").and_then(Value::as_str) == Some("Isolated");
    if !isolated || value.get("invert") != Some(&Value::Bool(false)) {
        return unsupported("pre_tokenizer Split that does not isolate its matches");
    }
    read.stages.push(regex.to_owned());
    Ok(())
}

/// Makes one list of patterns of a sequence of splits.
pub(super) fn merge_stages(stages: &[String]) -> Result<Vec<Pattern>, CompileError> {
    let Some((last, runs)) = stages.split_last() else {
        return unsupported("ByteLevel without any pattern");
    };
    let runs: Vec<Run> = runs.iter().map(|run| read_run(run)).collect::<Result<_, _>>()?;
    let mut taken = ClassUnicode::empty();
    for run in &runs {
        if !intersection(&taken, &run.class).ranges().is_empty() {
            return unsupported("pre_tokenizer Sequence of Splits with characters in common");
        }
        taken.union(&run.class);
    }
    let mut rest = ClassUnicode::new([ClassUnicodeRange::new('\0', char::MAX)]);
    rest.difference(&taken);

    let (before, after) = split_at_look_ahead(last);
    let (mut first, mut gaps) = (Vec::new(), Vec::new());
    for run in runs {
        read_within(run, &before, after.as_deref(), &mut first, &mut gaps)?;
    }
    first.extend(all_within(&before, &rest)?);
    let Some(after) = after else {
        let mut patterns = vec![pattern(Hir::alternation(first), MATCH_WHOLE)?];
        patterns.extend(gaps);
        return Ok(patterns);
    };
    let space = within(&parse(r"\s")?, &rest)?;
    let run = within(&parse(r"\s+")?, &rest)?;
    let end = Hir::look(regex_syntax::hir::Look::End);
    first.push(Hir::concat(vec![run.clone(), end]));
    let mut patterns = vec![pattern(Hir::alternation(first), MATCH_WHOLE)?];
    if !taken.ranges().is_empty() {
        let end = Hir::class(Class::Unicode(taken));
        patterns.push(pattern(Hir::concat(vec![run.clone(), end]), MATCH_DROPS_LAST)?);
    }
    patterns.push(pattern(Hir::concat(vec![run, space]), MATCH_DROPS_LAST)?);
    if !after.is_empty() {
        let after = Hir::alternation(all_within(&after, &rest)?);
        patterns.push(pattern(after, MATCH_WHOLE)?);
    }
    patterns.extend(gaps);
    Ok(patterns)
}

/// What becomes of a run: whole, if the last split finds nothing in it, else
/// what that split finds, and the gaps between.
fn read_within(
    run: Run,
    before: &[String],
    after: Option<&[String]>,
    first: &mut Vec<Hir>,
    gaps: &mut Vec<Pattern>,
) -> Result<(), CompileError> {
    let space = ClassUnicode::new(
        class_of(&parse(r"\s")?).into_iter().flat_map(|class| class.ranges().to_vec()),
    );
    if !intersection(&space, &run.class).ranges().is_empty() {
        return unsupported("pre_tokenizer Sequence with a Split of white space before the last");
    }
    let mut found = all_within(before, &run.class)?;
    found.extend(all_within(after.unwrap_or_default(), &run.class)?);
    let found = Hir::alternation(found);
    if super::dfa::matches_nothing(&found)? {
        first.push(run.hir);
        return Ok(());
    }
    if !run.unbounded {
        return unsupported("pre_tokenizer Sequence that splits a Split of bounded length again");
    }
    let kind = u8::try_from(gaps.len()).ok().and_then(|index| index.checked_add(MATCH_GAP));
    let Some(kind) = kind else {
        return Err(CompileError::TooLarge("pre_tokenizer Sequence"));
    };
    first.push(found);
    gaps.push(pattern(Hir::class(Class::Unicode(run.class)), kind)?);
    Ok(())
}

fn all_within(alternatives: &[String], class: &ClassUnicode) -> Result<Vec<Hir>, CompileError> {
    alternatives.iter().map(|alternative| within(&parse(alternative)?, class)).collect()
}

fn intersection(one: &ClassUnicode, other: &ClassUnicode) -> ClassUnicode {
    let mut both = one.clone();
    both.intersect(other);
    both
}

fn pattern(hir: Hir, kind: u8) -> Result<Pattern, CompileError> {
    match hir.properties().minimum_len() {
        Some(0) => unsupported("pre_tokenizer pattern that matches nothing at all"),
        _ => Ok(Pattern { hir, kind }),
    }
}

/// The top-level alternatives before and after the look-ahead.
fn split_at_look_ahead(regex: &str) -> (Vec<String>, Option<Vec<String>>) {
    let alternatives = alternatives(regex);
    match alternatives.iter().position(|alternative| alternative == LOOK_AHEAD) {
        Some(at) => {
            let (before, after) = alternatives.split_at(at);
            (before.to_vec(), Some(after.iter().skip(1).cloned().collect()))
        }
        None => (alternatives, None),
    }
}

/// Cuts a pattern at the bars that are in no group and no class.
fn alternatives(regex: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let (mut groups, mut in_class, mut escaped) = (0_usize, false, false);
    for character in regex.chars() {
        let plain = !escaped && !in_class;
        if plain && character == '|' && groups == 0 {
            parts.push(String::new());
            continue;
        }
        match character {
            '(' if plain => groups += 1,
            ')' if plain => groups = groups.saturating_sub(1),
            '[' if plain => in_class = true,
            ']' if !escaped => in_class = false,
            _ => {}
        }
        escaped = character == '\\' && !escaped;
        if let Some(part) = parts.last_mut() {
            part.push(character);
        }
    }
    parts
}

/// Reads a stage that isolates runs of one class.
fn read_run(regex: &str) -> Result<Run, CompileError> {
    let hir = parse(regex)?;
    let (class, unbounded) = match hir.kind() {
        HirKind::Repetition(run) if run.min == 1 && run.greedy => {
            (class_of(&run.sub), run.max.is_none())
        }
        _ => (class_of(&hir), false),
    };
    match class.cloned() {
        Some(class) => Ok(Run { hir, class, unbounded }),
        None => unsupported(
            "pre_tokenizer Sequence with a Split before the last that is no run of one class",
        ),
    }
}

fn class_of(hir: &Hir) -> Option<&ClassUnicode> {
    match hir.kind() {
        HirKind::Class(Class::Unicode(class)) => Some(class),
        _ => None,
    }
}

/// Parses one alternative, refusing what the two engines may take differently.
fn parse(regex: &str) -> Result<Hir, CompileError> {
    if let Some(text) = AMBIGUOUS.iter().find(|text| regex.contains(**text)) {
        return unsupported(format!("pre_tokenizer pattern with `{text}`"));
    }
    let refuse =
        |error: &dyn std::fmt::Display| unsupported(format!("pre_tokenizer pattern: {error}"));
    let ast = match ast::parse::Parser::new().parse(regex) {
        Ok(ast) => ast,
        Err(error) => return refuse(&error.kind()),
    };
    ast::visit(&ast, Checker { regex, caseless: 0 })?;
    match regex_syntax::hir::translate::Translator::new().translate(regex, &ast) {
        Ok(hir) => Ok(hir),
        Err(error) => refuse(&error.kind()),
    }
}

/// Refuses every construct that is not listed.
struct Checker<'a> {
    regex: &'a str,
    caseless: usize,
}

impl ast::Visitor for Checker<'_> {
    type Output = ();
    type Err = CompileError;

    fn finish(self) -> Result<(), CompileError> {
        Ok(())
    }

    fn visit_pre(&mut self, ast: &Ast) -> Result<(), CompileError> {
        match ast {
            Ast::Literal(_)
            | Ast::ClassBracketed(_)
            | Ast::Alternation(_)
            | Ast::Concat(_)
            | Ast::Empty(_) => Ok(()),
            Ast::ClassUnicode(class) => check_category(class),
            Ast::ClassPerl(class) => check_perl(class),
            Ast::Repetition(repetition) => match *repetition.ast {
                Ast::Repetition(_) => unsupported("pre_tokenizer pattern: possessive quantifier"),
                _ => Ok(()),
            },
            Ast::Group(group) => self.check_group(group),
            Ast::Dot(_) => unsupported("pre_tokenizer pattern: ."),
            Ast::Assertion(_) => unsupported("pre_tokenizer pattern: anchor"),
            Ast::Flags(_) => unsupported("pre_tokenizer pattern: flags"),
        }
    }

    fn visit_class_set_item_pre(&mut self, item: &ast::ClassSetItem) -> Result<(), CompileError> {
        match item {
            ast::ClassSetItem::Unicode(class) => check_category(class),
            ast::ClassSetItem::Perl(class) => check_perl(class),
            ast::ClassSetItem::Ascii(_) | ast::ClassSetItem::Bracketed(_) => {
                unsupported("pre_tokenizer pattern: class within a class")
            }
            ast::ClassSetItem::Empty(_)
            | ast::ClassSetItem::Literal(_)
            | ast::ClassSetItem::Range(_)
            | ast::ClassSetItem::Union(_) => Ok(()),
        }
    }

    fn visit_class_set_binary_op_pre(
        &mut self,
        _: &ast::ClassSetBinaryOp,
    ) -> Result<(), CompileError> {
        unsupported("pre_tokenizer pattern: class operator")
    }
}

impl Checker<'_> {
    fn check_group(&mut self, group: &ast::Group) -> Result<(), CompileError> {
        match &group.kind {
            ast::GroupKind::CaptureIndex(_) => Ok(()),
            ast::GroupKind::NonCapturing(flags) if flags.items.is_empty() => Ok(()),
            _ => {
                let text = self.regex.get(group.span.start.offset..group.span.end.offset);
                if text.is_some_and(|text| CASELESS.contains(&text)) {
                    self.caseless += 1;
                    return Ok(());
                }
                unsupported("pre_tokenizer pattern: group with flags or a name")
            }
        }
    }
}

fn check_category(class: &ast::ClassUnicode) -> Result<(), CompileError> {
    let known = match &class.kind {
        ast::ClassUnicodeKind::OneLetter(letter) => CATEGORIES.contains(&format!(" {letter} ")),
        ast::ClassUnicodeKind::Named(name) => CATEGORIES.contains(&format!(" {name} ")),
        ast::ClassUnicodeKind::NamedValue { .. } => false,
    };
    if known { Ok(()) } else { unsupported("pre_tokenizer pattern: property") }
}

fn check_perl(class: &ast::ClassPerl) -> Result<(), CompileError> {
    match class.kind {
        ast::ClassPerlKind::Space | ast::ClassPerlKind::Digit => Ok(()),
        ast::ClassPerlKind::Word => unsupported("pre_tokenizer pattern: \\w"),
    }
}

/// The same pattern on text that holds only characters of `class`.
fn within(hir: &Hir, class: &ClassUnicode) -> Result<Hir, CompileError> {
    let all = |parts: &[Hir]| -> Result<Vec<Hir>, CompileError> {
        parts.iter().map(|part| within(part, class)).collect()
    };
    Ok(match hir.kind() {
        HirKind::Empty => Hir::empty(),
        HirKind::Literal(literal) => {
            let text = std::str::from_utf8(&literal.0).unwrap_or_default();
            let holds = |c: char| class.ranges().iter().any(|r| (r.start()..=r.end()).contains(&c));
            if text.chars().all(holds) { hir.clone() } else { Hir::fail() }
        }
        HirKind::Class(Class::Unicode(of_pattern)) => {
            Hir::class(Class::Unicode(intersection(of_pattern, class)))
        }
        HirKind::Repetition(repetition) => Hir::repetition(Repetition {
            sub: Box::new(within(&repetition.sub, class)?),
            ..repetition.clone()
        }),
        HirKind::Capture(capture) => within(&capture.sub, class)?,
        HirKind::Concat(parts) => Hir::concat(all(parts)?),
        HirKind::Alternation(parts) => Hir::alternation(all(parts)?),
        HirKind::Class(Class::Bytes(_)) | HirKind::Look(_) => {
            return unsupported("pre_tokenizer pattern: bytes or look-around");
        }
    })
}
