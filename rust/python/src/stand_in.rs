//! Stand-ins until the I/O thread's loop and the blk plane are here: enough to import the package and to serve.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::exceptions::PyNotImplementedError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::queue::VirtQueue;

#[pyclass(frozen, module = "pyvirtio._core")]
pub struct IoThread {
    queues: Mutex<HashMap<usize, Arc<pyvirtio_core::VirtQueue>>>,
    closed: AtomicBool,
}

#[pymethods]
impl IoThread {
    #[new]
    #[pyo3(signature = (**_options))]
    fn new(_options: Option<&Bound<'_, PyDict>>) -> Self {
        Self { queues: Mutex::default(), closed: AtomicBool::new(false) }
    }

    fn run(&self, py: Python<'_>) {
        py.detach(|| {
            while !self.closed.load(Ordering::Relaxed) {
                let queues: Vec<_> =
                    self.queues.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
                queues.iter().for_each(|vq| vq.on_kick());
                std::thread::sleep(Duration::from_millis(1));
            }
        });
    }

    fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    fn add(&self, vq: &VirtQueue) {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.insert(Arc::as_ptr(&vq.inner) as usize, vq.inner.clone());
    }

    fn remove(&self, vq: &VirtQueue) {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.remove(&(Arc::as_ptr(&vq.inner) as usize));
    }
}

#[pyclass(frozen, module = "pyvirtio._core")]
pub struct BlkPlane {}

#[pymethods]
impl BlkPlane {
    #[new]
    #[pyo3(signature = (*_arguments, **_options))]
    fn new(_arguments: &Bound<'_, PyTuple>, _options: Option<&Bound<'_, PyDict>>) -> Self {
        Self {}
    }

    fn __call__(&self, _vq: &VirtQueue) -> PyResult<()> {
        Err(PyNotImplementedError::new_err("the blk plane is not here yet"))
    }
}
