//! When the device asks for kicks, and when it interrupts.

use crate::driver::{Driver, AVAIL, SIZE, USED};

const USED_EVENT: u64 = AVAIL + 4 + 2 * SIZE as u64;
const AVAIL_EVENT: u64 = USED + 4 + 8 * SIZE as u64;

fn event_idx() -> Driver {
    Driver::with(|config| config.event_idx = true)
}

#[test]
fn one_interrupt_for_a_batch() {
    let mut driver = Driver::new();
    driver.start_completing();
    (0..5).for_each(|head| driver.add(head));
    driver.vq.notify();
    assert_eq!(driver.used().len(), 5);
    assert_eq!(driver.interrupts(), 1);
}

#[test]
fn a_completion_outside_the_handler_is_published_at_once() {
    let mut driver = Driver::new();
    driver.add(0);
    driver.add(1);
    let (mut first, mut second) = (driver.pop().unwrap(), driver.pop().unwrap());
    first.complete().unwrap();
    assert_eq!((driver.used().len(), driver.interrupts()), (1, 1));
    second.complete().unwrap();
    assert_eq!((driver.used().len(), driver.interrupts()), (1, 1));
}

#[test]
fn no_interrupt_for_a_driver_that_wants_none() {
    let mut driver = Driver::new();
    driver.start_completing();
    driver.store(AVAIL, 1);
    driver.add(0);
    driver.vq.notify();
    assert_eq!((driver.used().len(), driver.interrupts()), (1, 0));
    assert_eq!(driver.vq.counters.suppressed.get(), 1);
}

#[test]
fn notify_on_empty_is_asked_first() {
    let mut driver = Driver::with(|config| config.notify_on_empty = true);
    driver.start_completing();
    driver.store(AVAIL, 1);
    driver.add(0);
    driver.vq.notify();
    assert_eq!(driver.interrupts(), 1);
}

#[test]
fn the_first_decision_after_a_start_signals() {
    let mut driver = event_idx();
    driver.start_completing();
    driver.store(USED_EVENT, 1000);
    driver.add(0);
    driver.vq.notify();
    assert_eq!(driver.interrupts(), 1);
    driver.add(1);
    driver.vq.notify();
    assert_eq!(driver.interrupts(), 0);
}

#[test]
fn an_interrupt_when_the_used_event_is_passed() {
    let mut driver = event_idx();
    driver.start_completing();
    let mut interrupts = Vec::new();
    for round in 0..6u16 {
        driver.store(USED_EVENT, 3);
        driver.add(round);
        driver.vq.notify();
        interrupts.push(driver.interrupts());
    }
    assert_eq!(interrupts, [1, 0, 0, 1, 0, 0]);
}

#[test]
fn the_used_event_may_lie_beyond_the_wrap() {
    let mut driver = Driver::with(|config| {
        config.event_idx = true;
        (config.next_avail, config.next_used) = (u16::MAX - 1, u16::MAX - 1);
    });
    driver.start_completing();
    driver.store(USED_EVENT, 1);
    let mut interrupts = Vec::new();
    for head in 0..5 {
        driver.add(head);
        driver.vq.notify();
        interrupts.push(driver.interrupts());
    }
    assert_eq!(interrupts, [1, 0, 0, 1, 0]);
}

#[test]
fn kicks_are_asked_for_at_the_index_that_comes_next() {
    let mut driver = event_idx();
    driver.start_completing();
    driver.add(0);
    driver.add(1);
    driver.vq.notify();
    assert_eq!(driver.load(AVAIL_EVENT), 2);
}

#[test]
fn kicks_are_asked_for_beyond_what_the_handler_left() {
    let mut driver = event_idx();
    driver.start(|_| ());
    driver.add(0);
    driver.add(1);
    driver.vq.notify();
    assert_eq!(driver.load(AVAIL_EVENT), 2);
}

#[test]
fn kicks_are_suppressed_while_the_handler_runs() {
    let mut driver = Driver::new();
    let memory = driver.memory.clone();
    driver.start(move |vq| {
        assert_eq!(memory.atomic16(USED).unwrap().load(std::sync::atomic::Ordering::SeqCst), 1);
        while let Some(mut chain) = vq.pop() {
            chain.complete().unwrap();
        }
    });
    driver.add(0);
    driver.vq.notify();
    assert_eq!(driver.used().len(), 1);
    assert_eq!(driver.load(USED), 0);
}
