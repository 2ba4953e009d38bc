//! `DirtyLog`.

use std::sync::Arc;

use pyo3::prelude::*;
use pyvirtio_core::dirty_log;

use crate::interrupt::CallFd;
use crate::memory::GuestMemory;

#[pyclass(frozen, module = "pyvirtio._core")]
pub struct DirtyLog {
    pub inner: Arc<dirty_log::DirtyLog>,
}

#[pymethods]
impl DirtyLog {
    #[new]
    #[pyo3(signature = (bitmap, changed))]
    fn new(bitmap: &GuestMemory, changed: Option<&CallFd>) -> Self {
        let changed = changed.map(|call| call.inner.clone());
        Self { inner: Arc::new(dirty_log::DirtyLog::new(bitmap.inner.clone(), changed)) }
    }
}
