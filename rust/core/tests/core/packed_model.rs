//! Well-formed chains in a packed ring against a model of the queue: what was added, popped, completed, and when to
//! interrupt, by the formula of the specification (virtio 1.3, 2.8.7.1) on 16-bit counters that never wrap early.

use std::collections::VecDeque;

use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;
use pyvirtio_core::Chain;

use crate::driver::{BUFFERS, INDIRECT, TABLE, WRITE};
use crate::packed_driver::{PackedDriver, Part, Place, AT_DESC, DISABLE};

#[derive(Debug, Clone)]
enum Step {
    /// Lengths, how many of them are readable, and whether they stand in a table.
    Add(Vec<u32>, usize, bool),
    Pop,
    /// Which of the popped chains, and how many bytes are written.
    Complete(usize, usize),
    Restart,
    /// How many descriptors ahead to be interrupted, or not at all.
    Ask(Option<u16>),
}

fn step() -> impl Strategy<Value = Step> {
    let lengths = prop::collection::vec(0u32..40, 1..4);
    prop_oneof![
        4 => (lengths, 0usize..4, any::<bool>()).prop_map(|(lengths, readable, table)| Step::Add(lengths, readable, table)),
        4 => Just(Step::Pop),
        4 => (0usize..8, 0usize..100).prop_map(|(which, bytes)| Step::Complete(which, bytes)),
        1 => Just(Step::Restart),
        2 => prop::option::of(0u16..8).prop_map(Step::Ask),
    ]
}

/// A chain as the model knows it.
#[derive(Debug, Clone)]
struct Known {
    id: u16,
    readable: u32,
    writable: u32,
    descs: u16,
}

/// What was decided about interrupts so far.
struct Asked {
    /// Used descriptors passed since the start, counted without a wrap, and at the last decision.
    used: u32,
    decided: Option<u32>,
    event: Option<u32>,
}

impl Asked {
    /// Whether passing `descs` more is to interrupt.
    fn pass(&mut self, descs: u16) -> bool {
        self.used += u32::from(descs);
        let (new, old) = (self.used, self.decided.replace(self.used));
        match (self.event, old) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(event), Some(old)) => (old..new).contains(&event),
        }
    }
}

struct Model {
    driver: PackedDriver,
    size: u16,
    free: Vec<u16>,
    room: u16,
    available: VecDeque<Known>,
    popped: Vec<(Known, Chain)>,
    /// With IN_ORDER: the popped ids in their order, each with the length once it is completed.
    order: Option<VecDeque<(Known, Option<u32>)>>,
    asked: Asked,
}

impl Model {
    fn new(size: u16, in_order: bool, start: u16) -> Self {
        let driver = PackedDriver::with(|config| {
            (config.size, config.in_order, config.event_idx) = (size, in_order, true);
            (config.next_avail, config.next_used) = (start, start);
        });
        driver.ask(driver.next, DISABLE);
        driver.start(|_| ());
        Self {
            driver,
            size,
            free: (0..size).collect(),
            room: size,
            available: VecDeque::new(),
            popped: Vec::new(),
            order: in_order.then(VecDeque::new),
            asked: Asked { used: 0, decided: None, event: None },
        }
    }

    fn add(&mut self, lengths: &[u32], readable: usize, table: bool) {
        let parts: Vec<Part> = (0..)
            .zip(lengths)
            .map(|(n, &length)| (BUFFERS + 64 * n, length, if (n as usize) < readable { 0 } else { WRITE }))
            .collect();
        let descs = if table { 1 } else { parts.len() as u16 };
        if descs > self.room || parts.len() > usize::from(self.size) {
            return;
        }
        let id = self.free.remove(0);
        let sum = |parts: &[Part]| parts.iter().map(|part| part.1).sum();
        let split = readable.min(parts.len());
        let known = Known { id, readable: sum(&parts[..split]), writable: sum(&parts[split..]), descs };
        if table {
            let at = TABLE + 64 * u64::from(id);
            for (n, &(address, length, flags)) in (0..).zip(&parts) {
                self.driver.desc_in(at, n, address, length, 0, flags);
            }
            self.driver.chain(&[(at, 16 * parts.len() as u32, INDIRECT)], id);
        } else {
            self.driver.chain(&parts, id);
        }
        self.room -= descs;
        self.available.push_back(known);
    }

    fn pop(&mut self) -> TestCaseResult {
        let chain = self.driver.vq.pop();
        let Some(known) = self.available.pop_front() else {
            prop_assert!(chain.is_none());
            return Ok(());
        };
        let chain = chain.unwrap();
        prop_assert_eq!(chain.head(), known.id);
        prop_assert_eq!(chain.readable_left(), known.readable as usize);
        prop_assert_eq!(chain.writable_left(), known.writable as usize);
        if let Some(order) = &mut self.order {
            order.push_back((known.clone(), None));
        }
        self.popped.push((known, chain));
        Ok(())
    }

    fn complete(&mut self, which: usize, bytes: usize) -> TestCaseResult {
        if which >= self.popped.len() {
            return Ok(());
        }
        let (known, mut chain) = self.popped.remove(which);
        let written = chain.write(&vec![7; bytes]).unwrap() as u32;
        chain.complete().unwrap();
        let due = self.due(known, written);
        let mut interrupt = false;
        if !due.is_empty() {
            interrupt = self.asked.pass(due.iter().map(|(known, _)| known.descs).sum());
        }
        self.check_used(&due)?;
        prop_assert_eq!(self.driver.interrupts(), u64::from(interrupt));
        Ok(())
    }

    /// What the driver gets back now that this chain is completed.
    fn due(&mut self, known: Known, written: u32) -> Vec<(Known, u32)> {
        let Some(order) = &mut self.order else {
            return vec![(known, written)];
        };
        order.iter_mut().find(|waiting| waiting.0.id == known.id).unwrap().1 = Some(written);
        let mut due = Vec::new();
        while let Some((known, Some(written))) = order.front().cloned() {
            due.push((known, written));
            order.pop_front();
        }
        due
    }

    /// The driver sees all that is due; what IN_ORDER skips was written whole, and is told of by a later id.
    fn check_used(&mut self, due: &[(Known, u32)]) -> TestCaseResult {
        let mut at = self.driver.seen;
        let mut expected = due.iter();
        while let Some(mut last) = expected.next() {
            let place = at;
            at.advance(last.0.descs, self.size);
            while self.order.is_some() && last.1 == last.0.writable {
                let Some(next) = expected.next() else { break };
                last = next;
                at.advance(last.0.descs, self.size);
            }
            prop_assert_eq!(self.used_at(place), Some((last.0.id, last.1)));
        }
        prop_assert_eq!(self.used_at(at), None);
        self.driver.seen = at;
        self.room += due.iter().map(|(known, _)| known.descs).sum::<u16>();
        self.free.extend(due.iter().map(|(known, _)| known.id));
        Ok(())
    }

    fn used_at(&mut self, place: Place) -> Option<(u16, u32)> {
        self.driver.seen = place;
        self.driver.used().first().copied()
    }

    fn restart(&mut self) {
        // Only between requests: what is in flight would be lost.
        if !self.popped.is_empty() {
            return;
        }
        (self.driver.config.next_avail, self.driver.config.next_used) = self.driver.vq.stop();
        self.driver.start(|_| ());
        self.asked.decided = None;
    }

    fn ask(&mut self, ahead: Option<u16>) {
        let Some(ahead) = ahead else {
            self.asked.event = None;
            return self.driver.ask(self.driver.seen, DISABLE);
        };
        let ahead = ahead.min(self.size);
        let mut event = self.driver.seen;
        event.advance(ahead, self.size);
        self.asked.event = Some(self.asked.used + u32::from(ahead));
        self.driver.ask(event, AT_DESC);
    }

    fn take(&mut self, step: Step) -> TestCaseResult {
        match step {
            Step::Add(lengths, readable, table) => self.add(&lengths, readable, table),
            Step::Pop => self.pop()?,
            Step::Complete(which, bytes) => self.complete(which, bytes)?,
            Step::Restart => self.restart(),
            Step::Ask(ahead) => self.ask(ahead),
        }
        // An event that is more than a lap behind would come up again; a driver renews it before.
        if self.asked.event.is_some_and(|event| self.asked.used > event + u32::from(self.size)) {
            self.ask(Some(0));
        }
        prop_assert_eq!(self.driver.state.broken(), None);
        let in_flight = self.order.as_ref().map_or(self.popped.len(), VecDeque::len);
        prop_assert_eq!(usize::from(self.driver.vq.in_flight()), in_flight);
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_packed_ring_does_what_the_model_does(
        (size, start) in (1u16..9).prop_flat_map(|size| (Just(size), 0..size)),
        (in_order, wrap) in any::<(bool, bool)>(),
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut model = Model::new(size, in_order, start | u16::from(wrap) << 15);
        // What was used before: in this lap up to the start, in the one before from there on.
        for index in 0..size {
            model.driver.raw(index, (0, 0, if (index < start) == wrap { 0x8080 } else { 0 }), 0);
        }
        for step in steps {
            model.take(step)?;
        }
        model.popped.into_iter().for_each(|(_, mut chain)| chain.complete().unwrap());
    }
}
