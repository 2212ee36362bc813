//! `--device`, and the list of what this machine and this build have.

use std::sync::OnceLock;

use anyhow::{Context, Result, bail};
use burn::tensor::Device;

/// Where to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum DeviceName {
    /// The processor, in pure Rust, with this project's own loops
    #[value(alias = "flex")]
    Cpu,
    /// The GPU of this build: cuda, or else wgpu
    Gpu,
    /// The processor, by burn's older backend
    Ndarray,
    /// A GPU through wgpu: Vulkan, Metal, DirectX 12
    Wgpu,
    /// An NVIDIA GPU through CUDA
    Cuda,
}

/// Where, and by how many threads.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct DeviceArgs {
    /// Where to compute [default: cpu]; the others are compiled in by cargo features
    #[arg(long, value_enum)]
    device: Option<DeviceName>,
    /// Threads to compute with [default: RAYON_NUM_THREADS, or one for each core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

/// Whether the threads asked for were started.
static STARTED: OnceLock<()> = OnceLock::new();

impl DeviceName {
    fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Gpu => "gpu",
            Self::Ndarray => "ndarray",
            Self::Wgpu => "wgpu",
            Self::Cuda => "cuda",
        }
    }

    /// The cargo feature that compiles it in.
    fn feature(self) -> &'static str {
        match self {
            Self::Cpu => "flex",
            Self::Ndarray => "ndarray",
            Self::Gpu | Self::Wgpu => "wgpu",
            Self::Cuda => "cuda",
        }
    }

    /// The devices of this name, best first, or `None` when it is not compiled in.
    #[allow(deprecated)] // burn would rather have everyone on `flex`; ndarray stays for comparison.
    fn devices(self) -> Option<Vec<Device>> {
        match self {
            #[cfg(feature = "flex")]
            Self::Cpu => Some(vec![Device::flex()]),
            Self::Gpu => Self::Cuda.devices().or_else(|| Self::Wgpu.devices()),
            #[cfg(feature = "ndarray")]
            Self::Ndarray => Some(vec![Device::ndarray()]),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => Some(Device::enumerate(burn::tensor::DeviceType::Wgpu).into_vec()),
            #[cfg(feature = "cuda")]
            Self::Cuda => Some(Device::enumerate(burn::tensor::DeviceType::Cuda).into_vec()),
            #[allow(unreachable_patterns)] // With every feature on, all are named above.
            _ => None,
        }
    }

    /// What `gpu` stands for in this build.
    fn resolved(self) -> Self {
        match self {
            Self::Gpu if Self::Cuda.devices().is_some() => Self::Cuda,
            Self::Gpu => Self::Wgpu,
            other => other,
        }
    }

    /// The one that computes unless another is asked for: the first compiled in.
    fn preferred() -> Option<Self> {
        <Self as clap::ValueEnum>::value_variants().iter().copied().find(|name| name.devices().is_some())
    }
}

impl DeviceArgs {
    fn chosen(self) -> Option<DeviceName> {
        self.device.or_else(DeviceName::preferred).map(DeviceName::resolved)
    }

    /// The name of the device.
    pub fn name(self) -> String {
        self.chosen().map_or_else(String::new, |name| name.name().to_owned())
    }

    /// The flags that choose the same device and as many threads.
    pub fn flags(self) -> Vec<String> {
        let device = self.device.map(|name| vec!["--device".to_owned(), name.name().to_owned()]);
        let threads = vec!["--threads".to_owned(), rayon::current_num_threads().to_string()];
        [device.unwrap_or_default(), threads].concat()
    }

    /// The device itself; the threads asked for are started.
    ///
    /// # Errors
    ///
    /// If it is not compiled in, or this machine has none.
    pub fn resolve(self) -> Result<Device> {
        if let Some(threads) = self.threads {
            if threads == 0 {
                bail!("--threads is 0, expected at least 1");
            }
            if STARTED.set(()).is_ok() {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
                pool.context("--threads: the threads run already")?;
            }
        }
        let Some(name) = self.chosen() else {
            bail!("no device is compiled in: build with --features flex");
        };
        let (shown, feature) = (name.name(), name.feature());
        let Some(devices) = name.devices() else {
            bail!(
                "the device `{shown}` is not compiled in: build with `cargo install --path crates/bsbr --features {feature}`"
            );
        };
        let Some(device) = devices.into_iter().next() else {
            bail!("this machine has no device for `{shown}`: `inspect --devices` lists what there is");
        };
        // Among several wgpu knows better than the order of the list which one is fast, and its environment variable can
        // choose another.
        #[cfg(feature = "wgpu")]
        if name == DeviceName::Wgpu {
            return Ok(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice));
        }
        Ok(device)
    }

    /// As many devices, each one of its own among GPUs; the CPU counts as many times.
    pub(crate) fn resolve_all(self, count: usize) -> Result<Vec<Device>> {
        if count == 0 {
            bail!("--devices 0: at least one is needed");
        }
        let first = self.resolve()?;
        let name = self.chosen().unwrap_or(DeviceName::Cpu);
        if count == 1 || matches!(name, DeviceName::Cpu | DeviceName::Ndarray) {
            return Ok(vec![first; count]);
        }
        let all = name.devices().unwrap_or_default();
        if all.len() < count {
            bail!("--devices {count}: this machine has {} for `{}`", all.len(), name.name());
        }
        Ok(all.into_iter().take(count).collect())
    }
}

/// A row for every device: its name, the hardware, whether it is what computes by default.
pub(crate) fn rows() -> Vec<Vec<String>> {
    let preferred = DeviceName::preferred();
    let mut rows = Vec::new();
    for name in <DeviceName as clap::ValueEnum>::value_variants().iter().filter(|&&name| name != DeviceName::Gpu) {
        let mut row = |what: String| rows.push(vec![name.name().to_owned(), what]);
        match name.devices() {
            None => row(format!("not compiled in (--features {})", name.feature())),
            Some(devices) if devices.is_empty() => row("compiled in; this machine has none".to_owned()),
            Some(devices) => {
                for (index, device) in devices.iter().enumerate() {
                    let default = if index == 0 && preferred == Some(*name) { " (default)" } else { "" };
                    row(format!("{}{default}", hardware(*name, device)));
                }
            }
        }
    }
    rows
}

/// What a device is made of, as its driver says, or the processor's threads.
fn hardware(name: DeviceName, device: &Device) -> String {
    match name {
        DeviceName::Cpu | DeviceName::Ndarray => format!("CPU, {} threads", rayon::current_num_threads()),
        #[cfg(any(feature = "wgpu", feature = "cuda"))]
        _ => device.identity().map_or_else(|| format!("{device:?}"), |identity| identity.name),
        #[cfg(not(any(feature = "wgpu", feature = "cuda")))]
        _ => format!("{device:?}"),
    }
}
