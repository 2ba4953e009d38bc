//! The four guards of a service, and who serves a kick.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier, Mutex};
use std::thread;

use pyvirtio_core::VirtQueue;

use crate::driver::{Driver, AVAIL, SIZE};

#[test]
fn a_kick_with_nothing_new_does_not_call_the_handler() {
    let driver = Driver::new();
    driver.start(|_| panic!("called"));
    driver.vq.notify();
    assert_eq!(driver.vq.counters.notifies.get(), 1);
}

#[test]
fn a_handler_that_takes_nothing_ends_the_service() {
    let mut driver = Driver::new();
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = calls.clone();
    driver.start(move |_| count(&counted));
    driver.add(0);
    driver.vq.notify();
    assert_eq!(calls.load(SeqCst), 1);
}

#[test]
fn a_handler_that_left_chains_is_called_again_for_a_new_one() {
    let mut driver = Driver::new();
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = calls.clone();
    driver.start(move |_| count(&counted));
    driver.add(0);
    driver.vq.notify();
    driver.add(1);
    driver.vq.notify();
    assert_eq!(calls.load(SeqCst), 2);
}

fn count(calls: &AtomicUsize) {
    calls.fetch_add(1, SeqCst);
}

/// Serves one chain per call and adds another, as a second vCPU would.
fn start_feeding(driver: Driver, calls: usize) -> Arc<Mutex<Driver>> {
    let vq = driver.vq.clone();
    let (memory, config) = (driver.memory.clone(), driver.config.clone());
    let driver = Arc::new(Mutex::new(driver));
    let (feeder, left) = (driver.clone(), AtomicUsize::new(calls));
    let handler = move |vq: &Arc<VirtQueue>| {
        if let Some(mut chain) = vq.pop() {
            chain.complete().unwrap();
            if left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok() {
                feeder.lock().unwrap().add(0);
            }
        }
    };
    vq.start(memory, &config, Arc::new(crate::driver::Closure(handler))).unwrap();
    driver
}

#[test]
fn the_budget_ends_a_service_and_signals_the_eventfd_for_the_rest() {
    let driver = Driver::new();
    let vq = driver.vq.clone();
    vq.attach();
    assert!(vq.take_kick());
    let driver = start_feeding(driver, 1000);
    driver.lock().unwrap().add(0);
    assert!(vq.service());
    assert_eq!(vq.counters.chains.get(), 256);
    assert!(vq.take_kick());
    while vq.service() {}
    assert_eq!(vq.counters.chains.get(), 1001);
}

#[test]
fn a_handler_that_never_has_enough_is_stopped_by_its_budget() {
    let mut driver = Driver::with(|config| config.size = 256);
    driver.vq.attach();
    assert!(driver.vq.take_kick());
    for n in 0..256 {
        driver.add(n);
    }
    let (memory, vq) = (driver.memory.clone(), driver.vq.clone());
    driver.start(move |vq| {
        while let Some(mut chain) = vq.pop() {
            chain.complete().unwrap();
            let avail = memory.atomic16(AVAIL + 2).unwrap(); // once more what stands there
            avail.store(avail.load(SeqCst).wrapping_add(1), SeqCst);
        }
    });
    assert!(vq.service());
    assert_eq!(vq.counters.chains.get(), 256);
}

#[test]
fn without_an_eventfd_a_service_goes_on_to_the_end() {
    let driver = Driver::new();
    let vq = driver.vq.clone();
    let driver = start_feeding(driver, 1000);
    driver.lock().unwrap().add(0);
    vq.notify();
    assert_eq!(vq.counters.chains.get(), 1001);
}

/// Start with a handler that says it runs and waits until it is told to go on, then completes.
fn start_waiting(driver: &Driver) -> (std::sync::mpsc::Receiver<()>, std::sync::mpsc::Sender<()>) {
    let ((running, is_running), (go_on, going_on)) = (channel(), channel());
    let going_on = Mutex::new(going_on);
    driver.start(move |vq| {
        running.send(()).unwrap();
        going_on.lock().unwrap().recv().unwrap();
        while let Some(mut chain) = vq.pop() {
            chain.complete().unwrap();
        }
    });
    (is_running, go_on)
}

#[test]
fn a_second_notify_leaves_its_work_to_the_thread_that_serves() {
    let mut driver = Driver::new();
    let (is_running, go_on) = start_waiting(&driver);
    driver.add(0);
    let vq = driver.vq.clone();
    let first = thread::spawn(move || vq.notify());
    is_running.recv().unwrap();
    driver.vq.notify();
    driver.add(1);
    driver.vq.notify();
    assert_eq!(driver.used(), []);
    go_on.send(()).unwrap();
    first.join().unwrap();
    assert_eq!(driver.used(), [(0, 0), (1, 0)]);
}

#[test]
fn stop_waits_for_the_handler() {
    let mut driver = Driver::new();
    let (is_running, go_on) = start_waiting(&driver);
    driver.add(0);
    let (server, stopper) = (driver.vq.clone(), driver.vq.clone());
    let serving = thread::spawn(move || server.notify());
    is_running.recv().unwrap();
    let stopping = thread::spawn(move || stopper.stop());
    thread::yield_now();
    assert_eq!(driver.vq.size(), SIZE);
    go_on.send(()).unwrap();
    serving.join().unwrap();
    let (next_avail, next_used) = stopping.join().unwrap();
    assert_eq!((next_avail, driver.vq.size()), (next_used, 0));
}

#[test]
fn a_handler_may_stop_its_own_queue() {
    let mut driver = Driver::new();
    driver.start(|vq| {
        vq.pop().unwrap().complete().unwrap();
        assert_eq!(vq.stop(), (1, 1));
    });
    driver.add(0);
    driver.add(1);
    driver.vq.notify();
    assert_eq!(driver.vq.size(), 0);
    driver.start_completing();
}

#[test]
fn nothing_is_served_while_stopped() {
    let driver = Driver::new();
    driver.vq.notify();
    driver.vq.attach();
    driver.vq.on_kick();
    driver.vq.detach();
    assert!(driver.vq.pop().is_none());
    assert_eq!(driver.vq.stop(), (0, 0));
    assert_eq!(driver.vq.counters.wakeups.get(), 1);
}

#[test]
fn attach_leaves_the_eventfd_signalled() {
    let mut driver = Driver::new();
    driver.start_completing();
    driver.add(0);
    driver.vq.attach();
    driver.vq.on_kick();
    assert_eq!(driver.used(), [(0, 0)]);
}

#[test]
fn a_notify_while_attached_signals_and_does_not_serve() {
    let mut driver = Driver::new();
    driver.start_completing();
    driver.vq.attach();
    driver.vq.on_kick();
    driver.add(0);
    driver.vq.notify();
    assert_eq!(driver.used(), []);
    driver.vq.on_kick();
    assert_eq!(driver.used(), [(0, 0)]);
}

#[test]
fn detach_serves_the_last_kick() {
    let mut driver = Driver::new();
    driver.start_completing();
    driver.vq.attach();
    driver.vq.on_kick();
    driver.add(0);
    driver.vq.signal();
    driver.vq.detach();
    assert_eq!(driver.used(), [(0, 0)]);
    driver.add(1);
    driver.vq.notify();
    assert_eq!(driver.used(), [(1, 0)]);
}

#[test]
fn drain_leaves_kicks_suppressed_until_rearm() {
    let mut driver = Driver::new();
    driver.start_completing();
    driver.add(0);
    assert!(driver.vq.drain());
    assert!(!driver.vq.has_work());
    assert_eq!(driver.load(crate::driver::USED), 1);
    driver.add(1);
    assert!(driver.vq.has_work());
    assert!(driver.vq.rearm());
    assert!(driver.vq.drain());
    assert!(!driver.vq.rearm());
    assert_eq!(driver.load(crate::driver::USED), 0);
    assert_eq!(driver.used().len(), 2);
}

#[test]
fn the_position_survives_a_stop_and_a_start() {
    let mut driver = Driver::new();
    driver.start_completing();
    driver.add(0);
    driver.vq.notify();
    (driver.config.next_avail, driver.config.next_used) = driver.vq.stop();
    driver.start_completing();
    driver.add(1);
    driver.vq.notify();
    assert_eq!(driver.used(), [(0, 0), (1, 0)]);
    assert_eq!(driver.interrupts(), 2);
}

#[test]
fn stopping_under_load_waits_for_every_copy() {
    for _ in 0..20 {
        let mut driver = Driver::new();
        driver.add(0);
        let mut chain = driver.pop().unwrap();
        let (vq, together) = (driver.vq.clone(), Arc::new(Barrier::new(2)));
        let at = together.clone();
        let writer = thread::spawn(move || {
            at.wait();
            while chain.write(b"x").is_ok() && chain.writable_left() > 0 {}
            chain.complete()
        });
        together.wait();
        vq.stop();
        let used = driver.used();
        let completed = writer.join().unwrap().is_ok();
        assert_eq!(used.len(), usize::from(completed));
        assert_eq!(driver.state.broken(), None);
    }
}
