//! How cost grows with the fleet: with its workers, and with the blocks it holds.

use crate::Run;
use crate::choice::Scene;
use crate::feed::Churn;
use crate::figures::{Case, Figure, interleave};
use crate::lookup::{self, Held};

/// Operations of one sample of the rate.
const OPERATIONS: usize = 100_000;

/// Fleets of 2 to 1000 workers that hold ten thousand to ten million blocks.
pub(crate) fn run(run: &Run<'_>) -> Vec<Figure> {
    let rounds = if run.quick { 5 } else { 11 };
    let sizes: &[(&str, usize)] = match run.quick {
        true => &[("10k", 10_000), ("1m", 1_000_000)],
        false => &[("10k", 10_000), ("1m", 1_000_000), ("10m", 10_000_000)],
    };
    let mut figures = Vec::new();
    for workers in [2_u16, 16, 128, 1000] {
        for (label, blocks) in sizes {
            let label = format!("{workers}w_{label}");
            let mut churn = Churn::new(run, workers, *blocks);
            let mut samples = Vec::new();
            for _ in 0..rounds {
                churn.fleet.reset();
                churn.go_on(run, OPERATIONS);
                samples.push(churn.fleet.applied_ns / churn.fleet.applied as f64);
            }
            churn.check();
            figures.push(Figure::of(format!("grow_apply_{label}"), samples, 0));
            let index = churn.fleet.replica.index();
            let bytes = index.bytes() as f64 / index.blocks() as f64;
            figures.push(Figure::once(format!("grow_bytes_{label}"), bytes));
            let mut fleet = churn.fleet;
            let held = Held { workers, steps: 16, prompts: 8 };
            held.store(&mut fleet, run.clock);
            let mut cases = vec![lookup::case(format!("grow_overlap_{label}"), &mut fleet, &held)];
            figures.extend(interleave(run.clock, rounds, std::mem::take(&mut cases)));
            drop(cases);
            let mut scene = Scene::new(fleet, workers, run.clock);
            scene.check();
            let prompts = crate::choice::PROMPTS as usize;
            let case = Case::new(format!("grow_choose_{label}"), prompts, || scene.select_all());
            figures.extend(interleave(run.clock, rounds, vec![case]));
        }
    }
    figures
}
