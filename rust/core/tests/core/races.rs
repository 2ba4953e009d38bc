//! What several threads do to a queue at once.

use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use pyvirtio_core::{Chain, Completed, Handler, Tap, VirtQueue};

use crate::driver::Driver;

/// Longer than anything here takes, unless it waits forever.
const FOREVER: Duration = Duration::from_secs(20);

/// Do both at once; false if they wait for each other.
fn both_end(one: impl FnOnce() + Send + 'static, two: impl FnOnce() + Send + 'static) -> bool {
    let (ended, ends) = channel();
    for work in [Box::new(one) as Box<dyn FnOnce() + Send>, Box::new(two)] {
        let ended = ended.clone();
        thread::spawn(move || {
            work();
            ended.send(()).unwrap();
        });
    }
    (0..2).all(|_| ends.recv_timeout(FOREVER).is_ok())
}

struct Forget;

impl Tap for Forget {
    fn completed(&self, _: Vec<Completed>) {}
}

#[test]
fn a_tap_may_come_and_go_while_the_queue_starts_and_stops() {
    let driver = Driver::new();
    let (vq, memory, config) = (driver.vq.clone(), driver.memory.clone(), driver.config.clone());
    let tapped = vq.clone();
    let taps = move || {
        for _ in 0..20_000 {
            tapped.set_tap(Some(Arc::new(Forget)));
            tapped.set_tap(None);
        }
    };
    let starts = move || {
        for _ in 0..20_000 {
            vq.start(memory.clone(), &config, Arc::new(crate::driver::Closure(|_: &Arc<VirtQueue>| ()))).unwrap();
            vq.stop();
        }
    };
    assert!(both_end(taps, starts));
}

#[test]
fn a_reset_need_not_wait_for_what_watches_a_completion() {
    let mut driver = Driver::new();
    driver.add(0);
    let mut chain = driver.pop().unwrap();
    let state = driver.state.clone();
    let (ended, ends) = channel();
    let ends = Mutex::new(ends);
    driver.vq.watch(Box::new(move || {
        let (state, ended) = (state.clone(), ended.clone());
        thread::spawn(move || {
            state.reset();
            ended.send(()).unwrap();
        });
        ends.lock().unwrap().recv_timeout(FOREVER).expect("the reset waits for us");
    }));
    chain.complete().unwrap();
    assert_eq!(driver.used(), [(0, 0)]);
}

#[test]
fn a_handler_that_holds_its_own_queue_takes_no_more_until_the_release() {
    let mut driver = Driver::new();
    driver.start(|vq| {
        let mut chain = vq.pop().unwrap();
        vq.hold();
        assert!(vq.pop().is_none());
        chain.complete().unwrap();
    });
    driver.add(0);
    driver.add(1);
    let (first, second) = (driver.vq.clone(), driver.vq.clone());
    assert!(both_end(move || first.notify(), || ()), "it waits for itself");
    driver.vq.notify();
    assert_eq!(driver.used(), [(0, 0)]);
    driver.vq.release();
    assert!(both_end(move || second.notify(), || ()), "it waits for itself");
    assert_eq!(driver.used(), [(1, 0)]);
}

/// Keeps what it takes until `finish`, as one that asks the host does.
struct Asking {
    kept: Mutex<Vec<Chain>>,
    entered: Sender<()>,
    finished: (Sender<()>, Mutex<Receiver<()>>),
}

impl Handler for Asking {
    fn handle(&self, vq: &Arc<VirtQueue>) {
        self.entered.send(()).unwrap();
        // Whoever exchanges the handler now may ask for what has not begun.
        let _ = self.finished.1.lock().unwrap().recv_timeout(Duration::from_millis(200));
        self.kept.lock().unwrap().extend(std::iter::from_fn(|| vq.pop()));
    }

    fn finish(&self) {
        for mut chain in self.kept.lock().unwrap().drain(..) {
            chain.complete().unwrap();
        }
        self.finished.0.send(()).unwrap();
    }
}

#[test]
fn a_handler_that_is_exchanged_as_it_begins_finishes_what_it_took() {
    let mut driver = Driver::new();
    let (entered, is_entered) = channel();
    let (finish, finished) = channel();
    let old = Asking { kept: Mutex::default(), entered, finished: (finish, Mutex::new(finished)) };
    driver.vq.start(driver.memory.clone(), &driver.config, Arc::new(old)).unwrap();
    driver.add(0);
    driver.add(1);
    let serving = driver.vq.clone();
    let server = thread::spawn(move || serving.service());
    is_entered.recv().unwrap();
    driver.vq.set_handler(Arc::new(crate::driver::Closure(|_: &Arc<VirtQueue>| ())));
    server.join().unwrap();
    assert_eq!(driver.broken(), "");
    assert_eq!(driver.used(), [(0, 0), (1, 0)]);
    assert_eq!(driver.interrupts(), 1);
}
