//! Measure: sends every case's requests to all targets in turn.

use std::time::{Duration, Instant};

use super::prompts::{Kind, Prompt, SIZES};
use super::targets::{Running, Target};
use super::{CONNECTIONS, GatewayError, float};
use crate::bench::load::{Answer, Connection, Fault, Outgoing, Times, at_once, cpu_ns};
use crate::stack::report::line;

/// Parts that the requests of a case with many connections are cut into, at most.
const SLICES: usize = 3;

/// Least share of choices on one connection that must be the engine that holds most,
/// in percent. All of them, but for a booking that ends a moment late on a busy
/// machine.
const RIGHT_PERCENT_MIN: usize = 95;

/// What is measured at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// Name of the size, one of [`SIZES`].
    pub size: &'static str,
    /// First seen, or a next turn.
    pub kind: Kind,
    /// 1 or [`CONNECTIONS`].
    pub connections: usize,
    /// Requests.
    pub count: usize,
}

impl Case {
    /// `8k_first_c1` and the like.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}_{}_c{}", self.size, self.kind.name(), self.connections)
    }

    /// Size of a request, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        SIZES.iter().find(|(name, _)| *name == self.size).map_or(0, |(_, bytes)| *bytes)
    }
}

/// What to run.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Few cases, and only what is there.
    pub quick: bool,
    /// Of the texts.
    pub seed: u64,
    /// What to compare; always with Envoy alone.
    pub targets: Vec<Target>,
}

impl Plan {
    /// The cases, those first that the goals are of.
    #[must_use]
    pub fn cases(&self) -> Vec<Case> {
        // Size, requests on one connection, requests on many.
        let sizes: &[(&str, usize, usize)] = if self.quick {
            &[("8k", 120, 480), ("128k", 24, 0)]
        } else {
            &[("8k", 300, 480), ("128k", 40, 48), ("1k", 200, 480), ("1m", 4, 16)]
        };
        let mut cases = Vec::new();
        for (size, one, many) in sizes {
            for (connections, count) in [(1, *one), (CONNECTIONS, *many)] {
                let kinds = Kind::ALL.into_iter().filter(|_| count > 0);
                cases.extend(kinds.map(|kind| Case { size, kind, connections, count }));
            }
        }
        cases
    }

    /// Longest time for all cases; none is begun after it.
    fn within(&self) -> Duration {
        Duration::from_secs(if self.quick { 90 } else { 540 })
    }
}

/// What came of a case at one target.
#[derive(Debug)]
pub struct Measured {
    /// Which case.
    pub case: Case,
    /// Which target.
    pub target: Target,
    /// How long its answers took.
    pub times: Times,
    /// Processor time of its processes, in microseconds per request; only where it
    /// had the machine for itself.
    pub cpu_us: Option<f64>,
}

/// Runs all cases.
///
/// - `ports`: of the engines.
///
/// # Errors
///
/// [`GatewayError`], at the first wrong answer.
pub async fn all(
    plan: &Plan,
    ports: &[u16],
    targets: &mut [Running],
    cases: &[(Case, Vec<Prompt>)],
) -> Result<Vec<Measured>, GatewayError> {
    let started = Instant::now();
    let mut all = Vec::new();
    for (case, prompts) in cases {
        if started.elapsed() > plan.within() {
            line(format_args!("{} left out: the time is up", case.name()));
            continue;
        }
        let begun = Instant::now();
        all.extend(match case.connections {
            1 => one(case, ports, targets, prompts).await?,
            _ => many(case, targets, prompts).await?,
        });
        line(format_args!("{}: {:.1} s", case.name(), begun.elapsed().as_secs_f64()));
    }
    Ok(all)
}

fn wrong(target: Target, case: &Case) -> impl Fn(Fault) -> GatewayError {
    let name = case.name();
    move |fault| GatewayError::Answer(target.name(), name.clone(), fault)
}

/// One connection to each target; each request goes to one after the other.
async fn one(
    case: &Case,
    ports: &[u16],
    targets: &[Running],
    prompts: &[Prompt],
) -> Result<Vec<Measured>, GatewayError> {
    struct Side<'a> {
        running: &'a Running,
        connection: Connection,
        times: Times,
        right: usize,
    }
    let mut sides = Vec::new();
    for running in targets {
        let connection = Connection::open(&running.address).await;
        let connection = connection.map_err(wrong(running.target, case))?;
        sides.push(Side { running, connection, times: Times::default(), right: 0 });
    }
    for prompt in prompts {
        sides.rotate_left(1);
        for (request, measured) in
            prompt.earlier.iter().map(|it| (it, false)).chain([(&prompt.request, true)])
        {
            for side in &mut sides {
                let target = side.running.target;
                let answer = side.connection.send(request).await;
                let answer = answer.and_then(|answer| Ok((target.served(&answer)?, answer.took)));
                let (served, took) = answer.map_err(wrong(target, case))?;
                if measured {
                    side.times.push(took);
                    side.right += usize::from(served == ports.get(prompt.holder).copied());
                }
            }
        }
    }
    let deciding = sides.iter().filter(|side| side.running.target.decides());
    let right: Vec<(Target, usize)> =
        deciding.map(|side| (side.running.target, side.right)).collect();
    let least = (prompts.len() * RIGHT_PERCENT_MIN).div_ceil(100);
    if right.iter().any(|(_, right)| *right < least) {
        return Err(GatewayError::Choices(case.name(), right, prompts.len()));
    }
    let measured = sides.into_iter().map(|side| Measured {
        case: *case,
        target: side.running.target,
        times: side.times,
        cpu_us: None,
    });
    Ok(measured.collect())
}

/// Many connections to one target at a time.
async fn many(
    case: &Case,
    targets: &[Running],
    prompts: &[Prompt],
) -> Result<Vec<Measured>, GatewayError> {
    struct Side<'a> {
        running: &'a Running,
        connections: Vec<Connection>,
        times: Times,
        cpu_ns: u64,
    }
    let mut sides = Vec::new();
    for running in targets {
        let mut connections = Vec::new();
        for _ in 0..case.connections {
            let connection = Connection::open(&running.address).await;
            connections.push(connection.map_err(wrong(running.target, case))?);
        }
        sides.push(Side { running, connections, times: Times::default(), cpu_ns: 0 });
    }
    // Each has something for every connection.
    let slices = (prompts.len() / case.connections.max(1)).clamp(1, SLICES);
    for part in prompts.chunks(prompts.len().div_ceil(slices).max(1)) {
        let earlier: Vec<Outgoing> = part.iter().filter_map(|it| it.earlier.clone()).collect();
        let requests: Vec<Outgoing> = part.iter().map(|prompt| prompt.request.clone()).collect();
        sides.rotate_left(1);
        for side in &mut sides {
            let target = side.running.target;
            let processes = side.running.processes();
            for (requests, measured) in [(&earlier, false), (&requests, true)] {
                let before = cpu_ns(&processes);
                let check = |_, answer: &Answer| target.served(answer).map(drop);
                let slice = at_once(&mut side.connections, requests, check).await;
                if let Some(fault) = slice.faults.first() {
                    return Err(wrong(target, case)(*fault));
                }
                if measured {
                    side.cpu_ns += cpu_ns(&processes).saturating_sub(before);
                    side.times.extend(&slice.times);
                }
            }
        }
    }
    let measured = sides.into_iter().map(|side| Measured {
        case: *case,
        target: side.running.target,
        cpu_us: Some(float(side.cpu_ns) / 1000.0 / float(side.times.count().max(1) as u64)),
        times: side.times,
    });
    Ok(measured.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_come_first_and_the_quick_run_has_them_too() {
        for quick in [false, true] {
            let plan = Plan { quick, seed: 1, targets: Target::ALL.to_vec() };
            let names: Vec<String> = plan.cases().iter().map(Case::name).collect();
            assert_eq!(names[..3], ["8k_first_c1", "8k_turn_c1", "8k_first_c16"]);
            assert!(
                ["128k_first_c1", "128k_turn_c1"]
                    .iter()
                    .all(|it| names[..6].contains(&it.to_string()))
            );
            assert_eq!(names.len(), if quick { 6 } else { 16 });
        }
    }
}
