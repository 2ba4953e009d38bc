//! `IoThread`.

use std::os::fd::{OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use pyvirtio_core::Watcher;

use crate::errors::os_error;
use crate::logging;
use crate::queue::VirtQueue;

#[pyclass(frozen, module = "pyvirtio._core")]
pub struct IoThread(pub Arc<pyvirtio_core::IoThread>);

#[pymethods]
impl IoThread {
    #[new]
    #[pyo3(signature = (*, poll_max_ns = 32768, poll_grow = 0, poll_shrink = 0))]
    fn new(poll_max_ns: u64, poll_grow: u64, poll_shrink: u64) -> PyResult<Self> {
        pyvirtio_core::IoThread::new(poll_max_ns, poll_grow, poll_shrink)
            .map(|inner| Self(Arc::new(inner)))
            .map_err(os_error)
    }

    #[getter]
    fn poll_max_ns(&self) -> u64 {
        self.0.poll_max_ns()
    }

    #[setter]
    fn set_poll_max_ns(&self, ns: u64) {
        self.0.set_poll_max_ns(ns);
    }

    fn run(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.0.run()).map_err(os_error)
    }

    fn close(&self) {
        self.0.close();
    }

    fn add(&self, vq: &VirtQueue) -> PyResult<()> {
        self.0.add(&vq.inner).map_err(os_error)
    }

    fn add_kick(&self, vq: &VirtQueue, fd: RawFd) -> PyResult<Kick> {
        let fd = self.0.add_kick(&vq.inner, fd).map_err(os_error)?;
        Ok(Kick { thread: self.0.clone(), fd: Mutex::new(Some(fd)) })
    }

    fn remove(&self, vq: &VirtQueue) {
        self.0.remove(&vq.inner);
    }

    fn watch(&self, fd: RawFd, callback: Py<PyAny>) -> PyResult<Watch> {
        let watch = self.0.watch(fd, Arc::new(Callback(callback))).map_err(os_error)?;
        Ok(Watch(Mutex::new(Some(watch))))
    }
}

/// A foreign kick fd in the epoll set of an I/O thread.
#[pyclass(frozen, module = "pyvirtio._core")]
pub struct Kick {
    thread: Arc<pyvirtio_core::IoThread>,
    fd: Mutex<Option<OwnedFd>>,
}

#[pymethods]
impl Kick {
    fn close(&self) {
        if let Some(fd) = self.fd.lock().unwrap_or_else(PoisonError::into_inner).take() {
            self.thread.remove_kick(fd);
        }
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        self.close();
    }
}

/// An fd that an I/O thread waits for on behalf of Python.
#[pyclass(frozen, module = "pyvirtio._core")]
pub struct Watch(Mutex<Option<pyvirtio_core::Watch>>);

impl Watch {
    fn open(&self) -> MutexGuard<'_, Option<pyvirtio_core::Watch>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Watch {
    fn arm(&self) -> PyResult<()> {
        self.open().as_ref().map_or(Ok(()), |watch| watch.arm().map_err(os_error))
    }

    fn disarm(&self) {
        if let Some(watch) = &*self.open() {
            watch.disarm();
        }
    }

    fn close(&self) {
        let closed = self.open().take();
        drop(closed);
    }
}

/// Attaches once for each event.
struct Callback(Py<PyAny>);

impl Watcher for Callback {
    fn ready(&self) -> bool {
        Python::attach(|py| {
            let result = self.0.call0(py);
            if let Err(error) = &result {
                logging::exception(py, "exception in the callback of a watch", error);
            }
            result.is_ok()
        })
    }
}
