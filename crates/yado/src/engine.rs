//! Which CPU engine runs a guest here, and the line that says why.

use crate::arguments::Engine;
use crate::exit::with_code;
use engine_kvm::Verdict;
use machine::EngineKind;

/// The engine that will run, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Which.
    pub kind: EngineKind,
    /// One clause.
    pub why: String,
}

impl Choice {
    /// `soft` or `kvm`.
    pub fn name(&self) -> &'static str {
        match self.kind {
            EngineKind::Soft => "soft",
            EngineKind::Kvm => "kvm",
        }
    }
}

/// Decides. KVM is probed only when it may be taken.
pub fn choose(wanted: Engine) -> anyhow::Result<Choice> {
    match wanted {
        Engine::Soft => Ok(Choice { kind: EngineKind::Soft, why: "asked for".into() }),
        Engine::Kvm => kvm(engine_kvm::probe()),
        Engine::Auto => Ok(auto(engine_kvm::probe())),
    }
}

/// Whoever asks for KVM gets it if there is any, and hears what it cannot do.
fn kvm(verdict: Verdict) -> anyhow::Result<Choice> {
    match verdict {
        Verdict::Usable { .. } => Ok(Choice { kind: EngineKind::Kvm, why: "asked for".into() }),
        Verdict::Unusable { why, engine_works: true, .. } => {
            Ok(Choice { kind: EngineKind::Kvm, why: format!("asked for, but /dev/kvm {why}") })
        }
        Verdict::Unusable { why, cure, engine_works: false } => {
            let cure = cure.map(|cure| format!("{cure}; or ")).unwrap_or_default();
            let what = format!("/dev/kvm {why}: {cure}use --engine soft");
            Err(with_code(crate::exit::YADO_FAILED, what))
        }
    }
}

fn auto(verdict: Verdict) -> Choice {
    match verdict {
        Verdict::Usable { .. } => Choice { kind: EngineKind::Kvm, why: "/dev/kvm runs kernels here".into() },
        Verdict::Unusable { why, .. } => Choice { kind: EngineKind::Soft, why: format!("/dev/kvm {why}") },
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn unusable(engine_works: bool) -> Verdict {
        Verdict::Unusable { why: "crawls".into(), cure: Some("wait".into()), engine_works }
    }

    #[test]
    fn kvm_is_taken_where_it_runs_kernels_and_where_somebody_insists() {
        let good = Verdict::Usable { loop_tenth_ns: 3 };
        assert_eq!(auto(good.clone()).name(), "kvm");
        assert_eq!(auto(unusable(true)), Choice { kind: EngineKind::Soft, why: "/dev/kvm crawls".into() });
        assert_eq!(kvm(good).unwrap().why, "asked for");
        assert!(kvm(unusable(true)).unwrap().why.contains("but /dev/kvm crawls"));
        let refused = kvm(unusable(false)).unwrap_err().to_string();
        assert_eq!(refused, "/dev/kvm crawls: wait; or use --engine soft");
    }
}
