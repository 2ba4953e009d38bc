//! A driver that adds faster than it is served: its I/O thread still does all else.

use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc::channel;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pyvirtio_core::VirtQueue;

use crate::driver::{Driver, AVAIL};
use crate::watches::{Running, HANG};

/// A queue on an I/O thread, and a driver that makes a chain available again whenever one was taken.
struct Endless {
    thread: Running,
    driver: Driver,
}

impl Endless {
    fn new() -> Self {
        let mut driver = Driver::with(|config| config.size = 256);
        for head in 0..256 {
            driver.add(head);
        }
        let memory = driver.memory.clone();
        driver.start(move |vq| {
            while let Some(mut chain) = vq.pop() {
                chain.complete().unwrap();
                let avail = memory.atomic16(AVAIL + 2).unwrap();
                avail.store(avail.load(SeqCst).wrapping_add(1), SeqCst);
            }
        });
        driver.vq.attach();
        let endless = Self { thread: Running::new(), driver };
        endless.thread.0.add(&endless.driver.vq).unwrap();
        wait_until(|| endless.served() > 1000);
        endless
    }

    fn served(&self) -> u64 {
        self.driver.vq.counters.chains.get()
    }
}

fn wait_until(done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < HANG);
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn another_queue_is_served() {
    let endless = Endless::new();
    let mut other = Driver::new();
    let (served, is_served) = channel();
    other.start(move |vq: &Arc<VirtQueue>| {
        vq.pop().unwrap().complete().unwrap();
        served.send(()).unwrap();
    });
    other.vq.attach();
    other.add(0);
    endless.thread.0.add(&other.vq).unwrap();
    is_served.recv_timeout(HANG).unwrap();
    let before = endless.served();
    wait_until(|| endless.served() > before);
}

#[test]
fn it_can_be_removed() {
    let endless = Endless::new();
    endless.thread.0.remove(&endless.driver.vq);
    // What is left is a kick for whoever polls the eventfd then.
    wait_until(|| endless.driver.vq.take_kick());
}

#[test]
fn it_can_be_stopped() {
    let endless = Endless::new();
    endless.thread.0.remove(&endless.driver.vq);
    endless.driver.vq.stop();
    assert_eq!(endless.driver.vq.size(), 0);
}

#[test]
fn the_thread_can_be_closed() {
    let Endless { thread, driver } = Endless::new();
    let (ended, is_ended) = channel();
    thread::spawn(move || {
        drop(thread);
        ended.send(()).unwrap();
    });
    is_ended.recv_timeout(HANG).unwrap();
    assert_eq!(driver.broken(), "");
}
