//! Steps a simulation, and does the plan's faults at their times.

use std::{sync::atomic::Ordering::Relaxed, time::Duration};

use super::{HEARTBEAT, World};
use crate::plan::{Fault, Plan};

/// A link that is silent for so long is dead, and noticed to be.
const NOTICEABLE: Duration = Duration::from_secs(2 * HEARTBEAT.as_secs() + 1);

/// Runs to the end, which must come in time.
pub(super) fn drive(sim: &mut turmoil::Sim<'_>, plan: &Plan, world: &World) -> Result<(), String> {
    let mut faults = plan.faults.clone();
    let mut repairs: Vec<(Duration, Fault)> = Vec::new();
    loop {
        let now = sim.elapsed();
        while faults.first().is_some_and(|(when, _)| *when <= now) {
            let (_, fault) = faults.remove(0);
            repairs.extend(begin(sim, &fault, now, (plan, world)));
        }
        for (_, fault) in repairs.extract_if(.., |(when, _)| *when <= now) {
            end(sim, &fault, (plan, world));
        }
        let mut stepped = Ok(false);
        let used = allocation_counter::measure(|| stepped = sim.step());
        world.memory.fetch_add(used.bytes_current, Relaxed);
        match stepped {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(error) => return Err(format!("the run did not end: {error}")),
        }
    }
}

/// Begins a fault; when it must be repaired, if ever.
fn begin(
    sim: &mut turmoil::Sim<'_>,
    fault: &Fault,
    now: Duration,
    (plan, world): (&Plan, &World),
) -> Option<(Duration, Fault)> {
    world.note_at(now, &format!("{fault:?}"));
    let far = |near| plan.gateways()[plan.home(near)];
    let silenced = |near| world.silenced.lock().unwrap().push((near, now));
    let lasts = match *fault {
        Fault::Partition { near, millis } => {
            sim.partition(near, far(near));
            silenced(near);
            millis
        }
        Fault::OneWay { near, to_gateway, millis } => {
            if to_gateway {
                sim.partition_oneway(near, far(near));
                silenced(near);
            } else {
                sim.partition_oneway(far(near), near);
            }
            millis
        }
        Fault::Hold { near, millis } => {
            sim.hold(near, far(near));
            millis
        }
        Fault::Slow { near, rate, millis } => {
            world.program(near).rate.set(Some(rate));
            millis
        }
        Fault::Latency { millis } => {
            sim.set_max_message_latency(Duration::from_millis(millis));
            return None;
        }
        Fault::Restart { host } => {
            // What a killed program gives back counts.
            let used = allocation_counter::measure(|| sim.bounce(host));
            world.memory.fetch_add(used.bytes_current, Relaxed);
            return None;
        }
        Fault::Stop { host } => {
            world.program(host).stop();
            return None;
        }
    };
    Some((now + Duration::from_millis(lasts), fault.clone()))
}

fn end(sim: &turmoil::Sim<'_>, fault: &Fault, (plan, world): (&Plan, &World)) {
    let now = sim.elapsed();
    let far = |near| plan.gateways()[plan.home(near)];
    if let Fault::Partition { near, .. } | Fault::OneWay { near, .. } = fault {
        // A silence that was too short to be noticed is none: perhaps nothing was lost by it.
        let noticeable =
            |(silent, since): &(&str, Duration)| silent != near || now.saturating_sub(*since) >= NOTICEABLE;
        world.silenced.lock().unwrap().retain(noticeable);
    }
    match *fault {
        Fault::Partition { near, .. } | Fault::OneWay { near, .. } => sim.repair(near, far(near)),
        Fault::Hold { near, .. } => sim.release(near, far(near)),
        Fault::Slow { near, .. } => world.program(near).rate.set(None),
        _ => return,
    }
    world.note_at(now, &format!("over: {fault:?}"));
}
