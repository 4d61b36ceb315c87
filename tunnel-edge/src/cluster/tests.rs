//! Tests of where keepers are sent, in simulated time.

use super::*;

const MINUTE: Duration = Duration::from_secs(60);
const REBALANCE: Duration = Duration::from_secs(300);

/// A cluster that is asked, and the time.
struct Run {
    cluster: Cluster,
    now: Instant,
}

/// A hint with an address of its own.
fn near(id: &str) -> Gateway {
    Gateway { id: id.to_owned(), edge_address: format!("{id}.example:8443"), draining: false }
}

/// A hint that only the load balancer leads to.
fn far(id: &str) -> Gateway {
    Gateway { edge_address: String::new(), ..near(id) }
}

fn leaving(id: &str) -> Gateway {
    Gateway { draining: true, ..near(id) }
}

fn direct(id: &str) -> Step {
    Step::Direct { gateway: id.to_owned(), address: format!("{id}.example:8443").parse().unwrap() }
}

impl Run {
    fn new(redundancy: usize) -> Self {
        let now = Instant::now();
        Self { cluster: Cluster::new("edge-a".to_owned(), redundancy, REBALANCE, 7, now), now }
    }

    /// With links of the first seats to the first of these gateways, which all have told the same.
    fn linked(redundancy: usize, held: usize, gateways: &[Gateway]) -> Self {
        let mut run = Self::new(redundancy);
        for (seat, gateway) in gateways.iter().enumerate().take(held) {
            run.claim(seat, &gateway.id, gateways).unwrap();
        }
        run
    }

    fn next(&mut self, seat: usize) -> Step {
        self.cluster.next(seat, Purpose::Missing, self.now)
    }

    /// The next step that is not to wait for a short time.
    fn next_dial(&mut self, seat: usize, purpose: Purpose) -> Step {
        loop {
            match self.cluster.next(seat, purpose, self.now) {
                Step::Wait(at) if at < self.now + START_SPREAD + Duration::from_secs(1) => self.now = at,
                step => return step,
            }
        }
    }

    fn claim(&mut self, seat: usize, gateway: &str, hints: &[Gateway]) -> Option<u64> {
        self.cluster.claim(seat, Purpose::Missing, None, (gateway, hints), self.now)
    }

    fn link(&self, seat: usize) -> u64 {
        self.cluster.seats[seat].link.as_ref().unwrap().link
    }

    /// Lets time pass until the move is due: the seat, and how long it took.
    fn wait_for_turn(&mut self, seats: usize) -> Option<(usize, Duration)> {
        let begun = self.now;
        while self.now < begun + 10 * MINUTE {
            for seat in 0..seats {
                if self.cluster.turn(seat, self.now) == Turn::Now {
                    return Some((seat, self.now - begun));
                }
            }
            self.now += Duration::from_secs(1);
        }
        None
    }
}

/// By falling weight.
fn best(gateways: &[&str]) -> Vec<String> {
    let mut best: Vec<String> = gateways.iter().map(|gateway| (*gateway).to_owned()).collect();
    best.sort_by_key(|gateway| std::cmp::Reverse(weight("edge-a", gateway)));
    best
}

#[test]
fn one_keeper_makes_the_first_link_and_a_gateway_alone_gets_no_more() {
    let mut run = Run::new(3);
    assert_eq!(run.next(1), Step::Configured);
    assert_eq!((run.next(0), run.next(2)), (Step::Rest, Step::Rest));
    run.claim(1, "a", &[]).unwrap();
    assert_eq!((run.next(0), run.next(2)), (Step::Unneeded, Step::Unneeded));
    assert_eq!(run.cluster.tally(), Tally { held: 1, wanted: 1, known: 1 });
}

#[test]
fn keepers_go_to_different_gateways_and_no_more_than_there_are() {
    let gateways = [near("a"), near("b"), near("c")];
    let mut run = Run::linked(8, 1, &gateways);
    let steps = [run.next_dial(1, Purpose::Missing), run.next_dial(2, Purpose::Missing)];
    let rest = best(&["b", "c"]);
    assert_eq!(
        steps,
        [direct(&rest[0]), direct(&rest[1])],
        "the best first, and what one dials no other does"
    );
    assert_eq!(run.next(3), Step::Unneeded, "all gateways are seen to");
    assert_eq!(run.cluster.tally(), Tally { held: 1, wanted: 3, known: 3 });
}

#[test]
fn a_gateway_is_held_once_whoever_is_faster() {
    let gateways = [far("a"), far("b")];
    let mut run = Run::linked(3, 1, &gateways);
    let first = run.claim(1, "b", &gateways);
    assert!(first.is_some());
    assert_eq!(run.claim(2, "b", &gateways), None);
    // A link that is made anew may be to the same one.
    let renewed = run.cluster.claim(1, Purpose::Renewal, None, ("b", &gateways), run.now);
    assert!(renewed > first);
    // What the old link says no longer counts.
    run.cluster.lost(first.unwrap(), run.now);
    assert_eq!(run.cluster.tally().held, 2);
}

#[test]
fn gateways_without_a_name_are_all_different() {
    let mut run = Run::new(2);
    assert!(run.claim(0, "", &[]).is_some() && run.claim(1, "", &[]).is_some());
    assert!(run.claim(0, &"x".repeat(254), &[]).is_some());
    assert_eq!(run.cluster.tally().known, 0);
}

#[test]
fn a_gateway_that_cannot_be_reached_is_looked_for_behind_the_configured_address() {
    let gateways = [near("a"), near("b")];
    let mut run = Run::linked(2, 1, &gateways);
    assert_eq!(run.next_dial(1, Purpose::Missing), direct("b"));
    assert!(run.cluster.unreachable("b", run.now), "news");
    let begun = run.now;
    let mut redials = 0;
    loop {
        match run.next_dial(1, Purpose::Missing) {
            Step::Configured => {
                redials += 1;
                assert_eq!(run.claim(1, "a", &gateways), None);
            }
            Step::Direct { .. } => assert!(!run.cluster.unreachable("b", run.now), "no news"),
            _ => break,
        }
    }
    assert_eq!(redials, MAX_REDIALS);
    assert!(run.now - begun > Duration::from_millis(7 * *REDIAL_SPACING_MS.start()), "{:?}", run.now - begun);
    // The pause is long, but the gateway's own address is tried again before its end, more seldom each time.
    let mut gaps = Vec::new();
    loop {
        let before = run.now;
        match run.next(1) {
            Step::Wait(at) => run.now = at,
            Step::Configured => break,
            step => {
                assert_eq!(step, direct("b"));
                assert!(!run.cluster.unreachable("b", run.now), "no news");
            }
        }
        if run.now > before {
            gaps.push(run.now - before);
        }
    }
    let pause: Duration = gaps.iter().sum();
    assert!(pause + START_SPREAD >= SEARCH_PAUSE / 2 && pause <= SEARCH_PAUSE, "{pause:?}");
    assert!((4..10).contains(&gaps.len()), "{gaps:?}");
}

#[test]
fn a_change_of_the_cluster_begins_a_new_search_at_once() {
    let gateways = [far("a"), far("b")];
    let mut run = Run::linked(2, 1, &gateways);
    while run.next_dial(1, Purpose::Missing) == Step::Configured {
        run.claim(1, "a", &gateways);
    }
    let link = run.link(0);
    run.cluster.updated(link, &gateways);
    assert!(matches!(run.next_dial(1, Purpose::Missing), Step::Wait(_)), "nothing is new");
    run.cluster.updated(link, &[far("a"), far("b"), far("c")]);
    assert_eq!(run.next_dial(1, Purpose::Missing), Step::Configured);
}

#[test]
fn the_gateway_of_a_lost_link_is_not_the_first_that_is_tried() {
    let gateways = [near("a"), near("b"), near("c")];
    let mut run = Run::linked(2, 2, &gateways);
    let lost = run.link(1);
    run.cluster.lost(lost, run.now);
    assert_eq!(run.next(1), direct("c"));
    assert!(run.claim(1, "c", &gateways).is_some());
    assert_eq!(run.cluster.tally().held, 2);
}

#[test]
fn a_lost_link_is_replaced_by_its_own_keeper() {
    let gateways = [near("a"), near("b")];
    let mut run = Run::linked(3, 2, &gateways);
    assert_eq!(run.next(2), Step::Unneeded);
    let link = run.link(1);
    run.cluster.lost(link, run.now);
    assert_eq!(run.next(2), Step::Unneeded, "which has not asked yet");
    assert_eq!(run.next(1), Step::Configured, "the gateway's own address is left alone");
}

#[test]
fn an_address_that_leads_to_another_gateway_is_left_alone() {
    let gateways = [near("a"), near("b")];
    let mut run = Run::linked(2, 1, &gateways);
    assert_eq!(run.next_dial(1, Purpose::Missing), direct("b"));
    let met = run.cluster.claim(1, Purpose::Missing, Some("b"), ("a", &gateways), run.now);
    assert_eq!(met, None);
    assert!(run.cluster.is_set_aside("b", run.now));
    run.now += MINUTE;
    // One that nobody has is taken all the same.
    assert!(run.cluster.claim(1, Purpose::Missing, Some("b"), ("c", &gateways), run.now).is_some());
    assert!(run.cluster.is_set_aside("b", run.now));
}

#[test]
fn without_any_link_the_configured_address_comes_first_then_what_was_known() {
    let gateways = [near("a"), near("b")];
    let mut run = Run::linked(2, 2, &gateways);
    for seat in 0..2 {
        let link = run.link(seat);
        run.cluster.lost(link, run.now);
    }
    run.now += MINUTE;
    assert_eq!(run.next(0), Step::Configured);
    assert_eq!(run.next(1), Step::Rest, "one of them finds the first");
    assert!(matches!(run.next(0), Step::Direct { .. }));
    assert_eq!(run.next(0), Step::Configured);
}

#[test]
fn a_gateway_that_drains_is_left_for_one_that_does_not() {
    let gateways = [near("a"), near("b"), leaving("c"), near("d")];
    let mut run = Run::linked(2, 2, &gateways);
    let drained = run.link(0);
    run.cluster.draining(drained);
    assert_eq!(run.cluster.tally(), Tally { held: 1, wanted: 2, known: 4 });
    assert_eq!(run.next(0), direct("d"), "at once, and to none that drains");
    assert!(run.claim(0, "d", &[near("b"), near("d")]).is_some());
    // The other gateway may not have heard of it.
    let other = run.link(1);
    run.cluster.updated(other, &[near("a"), near("b"), near("d")]);
    assert!(run.cluster.is_set_aside("a", run.now));
    // The end of the old link means nothing any more.
    run.cluster.lost(drained, run.now);
    assert_eq!(run.cluster.tally().held, 2);
}

#[test]
fn the_only_gateway_drains_and_the_configured_address_is_tried_without_a_pause() {
    let mut run = Run::linked(1, 1, &[near("a")]);
    let drained = run.link(0);
    run.cluster.draining(drained);
    for _ in 0..10 * MAX_REDIALS {
        assert_eq!(run.next_dial(0, Purpose::Missing), Step::Configured);
    }
    // A new process by the old name.
    assert!(run.claim(0, "a", &[near("a")]).is_some());
}

#[test]
fn a_link_that_drains_is_replaced_by_its_own_keeper() {
    let mut run = Run::linked(2, 1, &[near("a")]);
    let drained = run.link(0);
    run.cluster.draining(drained);
    assert_eq!(run.next(1), Step::Rest, "the one that has nothing to retire");
    assert_eq!(run.next_dial(0, Purpose::Missing), Step::Configured);
}

#[test]
fn of_two_links_that_drain_one_gets_the_only_gateway_that_stays() {
    let mut run = Run::linked(2, 2, &[near("a"), near("b"), near("c")]);
    for seat in 0..2 {
        let link = run.link(seat);
        run.cluster.draining(link);
    }
    assert_eq!((run.next(0), run.next(1)), (direct("c"), Step::Rest));
    assert!(run.claim(0, "c", &[leaving("a"), near("c")]).is_some());
    assert_eq!(run.next(1), Step::Unneeded);
}

#[test]
fn where_all_others_are_held_the_link_to_the_gateway_that_drains_may_go() {
    let gateways = [near("a"), near("b")];
    let mut run = Run::linked(2, 2, &gateways);
    let drained = run.link(0);
    run.cluster.draining(drained);
    assert_eq!(run.next(0), Step::Unneeded);
    let other = run.link(1);
    run.cluster.updated(other, &[leaving("a"), near("b"), near("c")]);
    assert_eq!(run.next_dial(0, Purpose::Missing), direct("c"));
}

#[test]
fn hints_that_are_gone_end_no_link_but_ask_for_none_either() {
    let gateways = [near("a"), near("b")];
    let mut run = Run::linked(2, 2, &gateways);
    for seat in 0..2 {
        let link = run.link(seat);
        run.cluster.updated(link, &[]);
    }
    assert_eq!(run.cluster.tally(), Tally { held: 2, wanted: 2, known: 2 });
    assert_eq!(run.wait_for_turn(2), None);
    let link = run.link(1);
    run.cluster.lost(link, run.now);
    assert_eq!(run.next(1), Step::Unneeded);
}

#[test]
fn a_gateway_that_has_lost_sight_of_another_makes_nobody_forget_it() {
    let gateways = [near("a"), near("b"), near("c")];
    let mut run = Run::linked(2, 2, &gateways);
    let link = run.link(0);
    run.cluster.updated(link, &[near("a")]);
    assert_eq!(run.cluster.tally().known, 3);
    let link = run.link(1);
    run.cluster.updated(link, &[near("b")]);
    assert_eq!(run.cluster.tally().known, 2);
}

/// Gateways by falling weight, so that what is better is known.
fn ranked(count: usize) -> Vec<Gateway> {
    let names: Vec<String> = (0..count).map(|number| format!("gateway-{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    best(&names).iter().map(|name| near(name)).collect()
}

#[test]
fn a_better_gateway_gets_one_link_at_a_random_moment() {
    let mut waits = Vec::new();
    for seed in 0..40 {
        let mut run = Run::new(2);
        let all = ranked(4);
        let now = run.now;
        run.cluster = Cluster::new("edge-a".to_owned(), 2, REBALANCE, seed, now);
        run.claim(0, &all[2].id, &all[2..]).unwrap();
        run.claim(1, &all[3].id, &all[2..]).unwrap();
        assert_eq!(run.wait_for_turn(2), None, "each gateway is held");
        for seat in 0..2 {
            let link = run.link(seat);
            run.cluster.updated(link, &all);
        }
        // The worse link first; the other only when that is over.
        let (seat, waited) = run.wait_for_turn(2).unwrap();
        assert_eq!(seat, 1);
        waits.push(waited);
        assert_eq!(run.cluster.turn(0, run.now), Turn::Never);
        let step = run.cluster.next(1, Purpose::Move, run.now);
        assert_eq!(step, direct(&all[0].id));
        let link = run.cluster.claim(1, Purpose::Move, Some(&all[0].id), (&all[0].id, &all), run.now);
        assert!(link.is_some());
        run.cluster.move_ended(1);
        let (seat, _) = run.wait_for_turn(2).unwrap();
        assert_eq!(seat, 0);
        assert_eq!(run.cluster.next(0, Purpose::Move, run.now), direct(&all[1].id));
        run.cluster.claim(0, Purpose::Move, Some(&all[1].id), (&all[1].id, &all), run.now).unwrap();
        run.cluster.move_ended(0);
        assert_eq!(run.wait_for_turn(2), None, "both are where they belong");
    }
    assert!(waits.iter().all(|wait| *wait <= REBALANCE + Duration::from_secs(1)));
    assert!(waits.iter().any(|wait| *wait < REBALANCE / 4) && waits.iter().any(|wait| *wait > REBALANCE / 2));
}

#[test]
fn a_move_that_fails_is_left_alone_for_longer_each_time() {
    let mut run = Run::new(1);
    let all = ranked(2);
    run.claim(0, &all[1].id, &all).unwrap();
    let mut tries = 0;
    let begun = run.now;
    while run.now < begun + 60 * MINUTE {
        let Some((seat, _)) = run.wait_for_turn(1) else { continue };
        assert_eq!(run.cluster.next(seat, Purpose::Move, run.now), direct(&all[0].id));
        run.cluster.unreachable(&all[0].id, run.now);
        // It was there from the beginning, so it is not looked for elsewhere.
        assert_eq!(run.cluster.next(seat, Purpose::Move, run.now), Step::Rest);
        run.cluster.move_ended(seat);
        tries += 1;
    }
    assert!((4..=16).contains(&tries), "{tries}");
}

#[test]
fn behind_a_load_balancer_a_new_gateway_is_looked_for_once() {
    let mut run = Run::new(1);
    let all: Vec<Gateway> = ranked(3).iter().map(|gateway| far(&gateway.id)).collect();
    run.claim(0, &all[1].id, &all[1..]).unwrap();
    assert_eq!(run.wait_for_turn(1), None);
    let link = run.link(0);
    run.cluster.updated(link, &all);
    assert_eq!(run.wait_for_turn(1).map(|(seat, _)| seat), Some(0));
    let mut redials = 0;
    while run.next_dial(0, Purpose::Move) == Step::Configured {
        redials += 1;
        // Neither the same nor a worse one.
        let met = &all[1 + redials as usize % 2].id;
        assert_eq!(run.cluster.claim(0, Purpose::Move, None, (met, &all), run.now), None);
    }
    assert_eq!(redials, MAX_REDIALS);
    run.cluster.move_ended(0);
    run.cluster.updated(link, &all);
    assert_eq!(run.wait_for_turn(1), None, "not again before something changes");
    run.cluster.updated(link, &all[1..]);
    run.cluster.updated(link, &all);
    run.wait_for_turn(1).unwrap();
    assert_eq!(run.next_dial(0, Purpose::Move), Step::Configured);
    assert!(run.cluster.claim(0, Purpose::Move, None, (&all[0].id, &all), run.now).is_some());
}

#[test]
fn a_loss_moves_only_the_edges_of_that_gateway_and_all_are_spread_evenly() {
    let gateways: Vec<String> = (0..5).map(|number| format!("gateway-{number}")).collect();
    let choice = |node: &str, without: Option<&str>| {
        let there = gateways.iter().filter(|gateway| Some(gateway.as_str()) != without);
        there.max_by_key(|gateway| weight(node, gateway)).unwrap().clone()
    };
    let mut counts = BTreeMap::new();
    for number in 0..5_000 {
        let node = format!("edge-{number}");
        let chosen = choice(&node, None);
        let after = choice(&node, Some("gateway-3"));
        assert!(chosen == "gateway-3" || after == chosen);
        *counts.entry(chosen).or_insert(0) += 1;
    }
    assert!(counts.values().all(|count| (850..1_150).contains(count)), "{counts:?}");
}

#[test]
fn hostile_hints_are_bounded() {
    let long = "x".repeat(300);
    let mut hints = vec![
        Gateway { id: long.clone(), ..near("a") },
        Gateway { id: "a\nWARN forged".to_owned(), ..near("a") },
        Gateway { id: String::new(), ..near("a") },
        Gateway { edge_address: format!("{long}:1"), ..near("b") },
        Gateway { edge_address: "http://c".to_owned(), ..near("c") },
    ];
    assert_eq!(hints::read(&hints).iter().filter(|hint| hint.address.is_none()).count(), 2);
    assert_eq!(hints::read(&hints).len(), 2);
    hints.extend((0..10_000).map(|number| near(&format!("gateway-{number}"))));
    let mut run = Run::linked(1, 0, &[]);
    let link = run.claim(0, "a", &hints).unwrap();
    assert_eq!(run.cluster.tally().known, 257);
    for gateway in 0..10_000 {
        run.cluster.unreachable(&format!("gateway-{gateway}"), run.now);
    }
    assert!(run.cluster.set_aside.len() <= 257);
    run.cluster.updated(link, &[]);
    assert_eq!((run.cluster.tally().known, run.cluster.set_aside.len()), (1, 0));
}

#[test]
fn the_same_seed_gives_the_same_steps() {
    let run = |seed| {
        let now = Instant::now();
        let gateways = [near("a"), far("b")];
        let mut cluster = Cluster::new("edge-a".to_owned(), 2, REBALANCE, seed, now);
        cluster.claim(0, Purpose::Missing, None, ("a", &gateways), now).unwrap();
        let mut at = now;
        let mut waits = Vec::new();
        for _ in 0..30 {
            match cluster.next(1, Purpose::Missing, at) {
                Step::Wait(until) => {
                    waits.push(until - at);
                    at = until;
                }
                _ => assert_eq!(cluster.claim(1, Purpose::Missing, None, ("a", &gateways), at), None),
            }
        }
        waits
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}
